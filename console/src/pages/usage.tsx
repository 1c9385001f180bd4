/** Tokens, requests, seconds and joules by day, key, model and kind. */

import { useEffect, useMemo, useState } from "preact/hooks";

import { ApiError, getJson, isAbort, messageOf } from "../api";
import { Chart } from "../chart";
import { compact, count, ms, span } from "../format";
import type { Amounts, UsageReport } from "../types";
import { Button, download, Empty, Field, Loading, PageHead, Problem } from "../ui";
import { Limited } from "./now";

const GROUPS = ["day", "model", "key", "operation", "priority"] as const;
const TITLES: Record<string, string> = { day: "Day", model: "Model", key: "Key", operation: "Kind", priority: "Priority" };
const RANGES: Record<string, string> = { "7": "last 7 days", "30": "last 30 days", "90": "last 90 days", "": "all" };

function firstDay(days: string): string {
  if (!days) return "";
  return new Date(Date.now() - (Number(days) - 1) * 86_400_000).toISOString().slice(0, 10);
}

function useReport(by: string, days: string, version: number): [UsageReport | null, unknown] {
  const [report, setReport] = useState<UsageReport | null>(null);
  const [error, setError] = useState<unknown>(null);
  useEffect(() => {
    const call = new AbortController();
    const query = new URLSearchParams({ by, since: firstDay(days) });
    getJson<UsageReport>(`/admin/usage?${query}`, call.signal).then(
      (answer) => (setReport(answer), setError(null)),
      (problem) => isAbort(problem) || setError(problem),
    );
    return () => call.abort();
  }, [by, days, version]);
  return [report, error];
}

export function Usage() {
  const [by, setBy] = useState<string[]>(["day", "model"]);
  const [days, setDays] = useState("30");
  const [version, setVersion] = useState(0);
  const [report, error] = useReport(by.join(","), days, version);
  const [daily] = useReport("day", days, version);
  const again = () => setVersion(version + 1);
  if (error instanceof ApiError && error.status === 403) return <Limited text={error.message} />;
  const toggle = (group: string) => {
    const next = by.includes(group) ? by.filter((other) => other !== group) : [...by, group];
    if (next.length > 0) setBy(GROUPS.filter((name) => next.includes(name)));
  };
  return (
    <>
      <PageHead title="Usage" note="Days are in UTC. A key is shown by its short id.">
        {report && report.rows.length > 0 && <Button icon="save" label="Export CSV" onClick={() => download("usage.csv", csv(report), "text/csv")} />}
        <Button icon="again" label="Refresh" onClick={again} />
      </PageHead>
      <form class="filters" onSubmit={(event) => event.preventDefault()} aria-label="Filters">
        <Field label="Days">
          <select value={days} onChange={(event) => setDays(event.currentTarget.value)}>
            {Object.entries(RANGES).map(([value, title]) => (
              <option key={value} value={value}>
                {title}
              </option>
            ))}
          </select>
        </Field>
        <fieldset class="choices">
          <legend>A row for each</legend>
          {GROUPS.map((group) => (
            <label key={group}>
              <input type="checkbox" checked={by.includes(group)} onChange={() => toggle(group)} /> {TITLES[group]!.toLowerCase()}
            </label>
          ))}
        </fieldset>
      </form>
      {error !== null && <Problem text={messageOf(error)} again={again} />}
      {!report && error === null && <Loading />}
      {report?.rows.length === 0 && <Empty title="Nothing was counted in these days">Each request that ends is counted within some seconds.</Empty>}
      {report && report.rows.length > 0 && (
        <>
          {daily && <Days report={daily} days={days} />}
          <Table report={report} />
        </>
      )}
    </>
  );
}

/** The beginning of each day from one on, to today. */
function everyDay(first: number): number[] {
  const count = Math.floor((Date.now() / 1000 - first) / 86_400) + 1;
  return Array.from({ length: Math.max(1, Math.min(count, 3660)) }, (_, index) => first + index * 86_400);
}

function Days({ report, days }: { report: UsageReport; days: string }) {
  const { times, tokens, requests } = useMemo(() => {
    const known = new Map(report.rows.map((row) => [Date.parse(`${row.group.day}T00:00:00Z`) / 1000, row.amounts]));
    const times = everyDay(days ? Date.parse(firstDay(days)) / 1000 : Math.min(...known.keys()));
    const of = (value: (amounts: Amounts) => number) => times.map((time) => (known.has(time) ? value(known.get(time)!) : null));
    return {
      times,
      tokens: [{ name: "tokens", colour: "accent", bars: true, values: of((a) => a.prompt_tokens + a.completion_tokens) }],
      requests: [{ name: "requests", colour: "second", bars: true, values: of((a) => a.requests) }],
    };
  }, [report, days]);
  const { total } = report;
  return (
    <section class="charts two" aria-label="By day">
      <Chart title="Tokens by day" now={compact(total.prompt_tokens + total.completion_tokens)} times={times} series={tokens} format={compact} height={150} days />
      <Chart title="Requests by day" now={compact(total.requests)} times={times} series={requests} format={compact} height={150} days />
    </section>
  );
}

const COLUMNS: [title: string, name: keyof Amounts, text: (value: number) => string][] = [
  ["Requests", "requests", count],
  ["Failed", "failed", count],
  ["Refused", "refused", count],
  ["Cancelled", "cancelled", count],
  ["Prompt", "prompt_tokens", count],
  ["Cached", "cached_tokens", count],
  ["Answer", "completion_tokens", count],
  ["Thinking", "reasoning_tokens", count],
  ["Engine time", "seconds", (value) => (value < 60 ? ms(1000 * value) : span(value))],
  ["Joules", "joules", (value) => count(Math.round(value))],
];

function Table({ report }: { report: UsageReport }) {
  return (
    <div class="scroll" tabIndex={0} role="region" aria-label="Usage">
      <table class="plain-grid">
        <thead>
          <tr>
            {report.by.map((group) => (
              <th key={group}>{TITLES[group]}</th>
            ))}
            {COLUMNS.map(([title]) => (
              <th key={title} class="number">
                {title}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {report.rows.map((row) => (
            <tr key={Object.values(row.group).join("\n")}>
              {report.by.map((group) => (
                <td key={group}>{row.group[group]}</td>
              ))}
              <Values amounts={row.amounts} />
            </tr>
          ))}
        </tbody>
        <tfoot>
          <tr>
            <th scope="row" colSpan={report.by.length}>
              Total
            </th>
            <Values amounts={report.total} />
          </tr>
        </tfoot>
      </table>
    </div>
  );
}

function Values({ amounts }: { amounts: Amounts }) {
  return (
    <>
      {COLUMNS.map(([title, name, text]) => {
        const value = amounts[name];
        return (
          <td key={title} class={`number${value ? "" : " faint"}`}>
            {value == null ? "–" : text(value)}
          </td>
        );
      })}
    </>
  );
}

function csv(report: UsageReport): string {
  const cell = (value: unknown) => `"${String(value ?? "").replaceAll('"', '""')}"`;
  const heads = [...report.by, ...COLUMNS.map(([, name]) => name)];
  const rows = report.rows.map((row) => [...report.by.map((group) => row.group[group]), ...COLUMNS.map(([, name]) => row.amounts[name])]);
  return [heads, ...rows].map((row) => row.map(cell).join(",")).join("\r\n");
}
