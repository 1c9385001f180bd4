/** Requests that have ended: the list with its filters, one of them, two beside each other. */

import { useEffect, useState } from "preact/hooks";

import { ApiError, getJson, isAbort, messageOf } from "../api";
import { count, iso, moment, ms, rate } from "../format";
import { go, link, route } from "../route";
import { session } from "../session";
import { useStore } from "../store";
import type { Trace } from "../types";
import { Badge, Button, Empty, Field, Loading, PageHead, Problem } from "../ui";
import { Limited } from "./now";
import { Comparison, RequestView } from "./request";

export function Requests() {
  const [, first, second] = useStore(route);
  if (first && second) return <Comparison ids={[first, second]} />;
  if (first) return <RequestView id={first} />;
  return <List />;
}

interface Filters {
  model: string;
  outcome: string;
  slower: string;
  minutes: string;
  client: string;
}

const ALL: Filters = { model: "", outcome: "", slower: "", minutes: "", client: "" };
const LIMIT = 50;

function address(filters: Filters, skip: number): string {
  const query = new URLSearchParams({ limit: String(LIMIT), skip: String(skip) });
  if (filters.model) query.set("model", filters.model);
  if (filters.outcome) query.set("outcome", filters.outcome);
  if (Number(filters.slower) > 0) query.set("slower_than_ms", String(Number(filters.slower)));
  if (filters.minutes) query.set("since", String(Math.round(Date.now() / 1000 - Number(filters.minutes) * 60)));
  if (filters.client) query.set("client", filters.client);
  return `/admin/traces?${query}`;
}

interface Listed {
  data: Trace[];
  has_more: boolean;
}

function List() {
  const [filters, setFilters] = useState(ALL);
  const [listed, setListed] = useState<Listed | null>(null);
  const [error, setError] = useState<unknown>(null);
  const [version, setVersion] = useState(0);
  const [chosen, setChosen] = useState<string[]>([]);

  useEffect(() => {
    const call = new AbortController();
    // Typing into a filter sends one request, not one for each letter.
    const timer = setTimeout(() => {
      getJson<Listed>(address(filters, 0), call.signal).then(
        (answer) => (setListed(answer), setError(null)),
        (problem) => isAbort(problem) || setError(problem),
      );
    }, 150);
    return () => (clearTimeout(timer), call.abort());
  }, [filters, version]);

  const more = async () => {
    const rest = await getJson<Listed>(address(filters, listed!.data.length)).catch((problem) => (setError(problem), null));
    if (rest) setListed({ data: [...listed!.data, ...rest.data], has_more: rest.has_more });
  };
  const choose = (id: string) =>
    setChosen((last) => (last.includes(id) ? last.filter((other) => other !== id) : [...last, id].slice(-2)));

  if (error instanceof ApiError && error.status === 403) return <Limited text={error.message} />;
  const filtered = Object.values(filters).some(Boolean);
  return (
    <>
      <PageHead title="Requests" note="Requests that have ended, newest first.">
        <Button icon="columns" label="Compare" disabled={chosen.length !== 2} title="Choose two requests" onClick={() => go("requests", ...chosen)} />
        <Button icon="again" label="Refresh" onClick={() => setVersion((last) => last + 1)} />
      </PageHead>
      <FilterRow filters={filters} change={(part) => setFilters({ ...filters, ...part })} />
      {error !== null && <Problem text={messageOf(error)} again={() => setVersion((last) => last + 1)} />}
      {!listed && error === null && <Loading />}
      {listed?.data.length === 0 && (
        <Empty title={filtered ? "No request matches these filters" : "No request is kept yet"}>
          {filtered ? (
            <Button label="Clear the filters" onClick={() => setFilters(ALL)} />
          ) : (
            <>
              Send one from the <a href={link("playground")}>playground</a>. The setting telemetry.traces keeps a record of each.
            </>
          )}
        </Empty>
      )}
      {listed && listed.data.length > 0 && <Table traces={listed.data} chosen={chosen} choose={choose} />}
      {listed?.has_more && <Button label={`Show ${LIMIT} more`} onClick={() => void more()} />}
    </>
  );
}

function FilterRow({ filters, change }: { filters: Filters; change: (part: Partial<Filters>) => void }) {
  const { models } = useStore(session);
  return (
    <form class="filters" onSubmit={(event) => event.preventDefault()} aria-label="Filters">
      <Field label="Model">
        <select value={filters.model} onChange={(event) => change({ model: event.currentTarget.value })}>
          <option value="">all</option>
          {models.map((model) => (
            <option key={model.id}>{model.id}</option>
          ))}
        </select>
      </Field>
      <Field label="Outcome">
        <select value={filters.outcome} onChange={(event) => change({ outcome: event.currentTarget.value })}>
          <option value="">all</option>
          {["ok", "refused", "error", "cancelled"].map((outcome) => (
            <option key={outcome}>{outcome}</option>
          ))}
        </select>
      </Field>
      <Field label="Received">
        <select value={filters.minutes} onChange={(event) => change({ minutes: event.currentTarget.value })}>
          <option value="">any time</option>
          <option value="15">last 15 minutes</option>
          <option value="60">last hour</option>
          <option value="1440">last day</option>
          <option value="10080">last week</option>
        </select>
      </Field>
      <Field label="Slower than, ms">
        <input type="number" min="0" inputMode="numeric" value={filters.slower} onInput={(event) => change({ slower: event.currentTarget.value })} />
      </Field>
      <Field label="Key begins with">
        <input type="text" spellcheck={false} value={filters.client} onInput={(event) => change({ client: event.currentTarget.value })} />
      </Field>
    </form>
  );
}

function Table({ traces, chosen, choose }: { traces: Trace[]; chosen: string[]; choose: (id: string) => void }) {
  return (
    <table class="grid">
      <thead>
        <tr>
          <th>
            <span class="hidden">Compare</span>
          </th>
          <th>Request</th>
          <th>Received</th>
          <th>Model</th>
          <th>Outcome</th>
          <th class="number">Tokens</th>
          <th class="number">First token</th>
          <th class="number">Tokens/s</th>
          <th class="number">Total</th>
        </tr>
      </thead>
      <tbody>
        {traces.map((trace) => (
          <tr key={trace.id}>
            <td data-label="Compare" class="choice">
              <input type="checkbox" aria-label={`Compare ${trace.id}`} checked={chosen.includes(trace.id)} onChange={() => choose(trace.id)} />
            </td>
            <th scope="row" data-label="Request">
              <a href={link("requests", trace.id)}>
                <code>{trace.id.slice(0, 12)}</code>
              </a>
              <span class="sub">
                {trace.operation}
                {trace.client ? ` · key ${trace.client.slice(0, 8)}` : ""}
              </span>
            </th>
            <td data-label="Received">
              <time dateTime={new Date(trace.time * 1000).toISOString()} title={iso(trace.time)}>
                {moment(trace.time)}
              </time>
            </td>
            <td data-label="Model">{trace.model || "–"}</td>
            <td data-label="Outcome">
              <Badge state={trace.outcome} />
              {trace.error && <span class="sub">{trace.error}</span>}
            </td>
            <td data-label="Tokens" class="number">
              {count(trace.metrics.usage.prompt_tokens)} + {count(trace.metrics.usage.completion_tokens)}
            </td>
            <td data-label="First token" class="number">
              {ms(trace.metrics.time_to_first_token_ms)}
            </td>
            <td data-label="Tokens/s" class="number">
              {rate(trace.metrics.decode_tokens_per_second)}
            </td>
            <td data-label="Total" class="number">
              {ms(trace.metrics.total_ms)}
            </td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}
