/** Well-known models: what each needs, whether it fits here, and a button that downloads it. */

import { useEffect, useMemo, useState } from "preact/hooks";

import { ApiError, getJson, isAbort, lines, messageOf, send } from "../api";
import { bytes, count } from "../format";
import { refresh } from "../overview";
import { check } from "../session";
import type { LibraryEntry, PullState } from "../types";
import { Badge, Button, Empty, Field, Loading, memoryText, Problem } from "../ui";

const TASKS: Record<string, string> = { "": "all", generate: "text", embed: "embeddings", rerank: "ranking" };
const FIRST = 12;

export function Library({ plan }: { plan: (model: string) => void }) {
  const [entries, setEntries] = useState<LibraryEntry[] | null>(null);
  const [problem, setProblem] = useState<Error | null>(null);
  const [round, setRound] = useState(0);
  useEffect(() => {
    const call = new AbortController();
    getJson<{ data: LibraryEntry[] }>("/admin/library", call.signal).then(
      ({ data }) => (setEntries(data), setProblem(null)),
      (error) => isAbort(error) || setProblem(error),
    );
    return () => call.abort();
  }, [round]);
  return (
    <section aria-label="Library">
      <h2>Library {entries && <span class="faint">{entries.length} models</span>}</h2>
      {/* The front of a cluster has none, which is no failure. */}
      {problem instanceof ApiError && problem.status === 400 && <Empty title="There is no library here">{problem.message}</Empty>}
      {problem && !(problem instanceof ApiError && problem.status === 400) && <Problem text={messageOf(problem)} again={() => setRound(round + 1)} />}
      {!entries && !problem && <Loading />}
      {entries && <Filtered entries={entries} plan={plan} pulled={() => setRound(round + 1)} />}
    </section>
  );
}

interface ListProps {
  entries: LibraryEntry[];
  plan: (model: string) => void;
  pulled: () => void;
}

function Filtered({ entries, plan, pulled }: ListProps) {
  const [text, setText] = useState("");
  const [task, setTask] = useState("");
  const [fitting, setFitting] = useState(false);
  const [all, setAll] = useState(false);
  const matching = useMemo(
    () => entries.filter((entry) => (!task || entry.task === task) && (!fitting || entry.fits) && matches(entry, text)),
    [entries, text, task, fitting],
  );
  const shown = all ? matching : matching.slice(0, FIRST);
  return (
    <>
      <form class="filters" onSubmit={(event) => event.preventDefault()} aria-label="Filters of the library">
        <Field label="Search">
          <input type="search" spellcheck={false} placeholder="coder, vision, Apache …" value={text} onInput={(event) => setText(event.currentTarget.value)} />
        </Field>
        <Field label="For">
          <select value={task} onChange={(event) => setTask(event.currentTarget.value)}>
            {Object.entries(TASKS).map(([value, title]) => (
              <option key={value} value={value}>
                {title}
              </option>
            ))}
          </select>
        </Field>
        <label class="check">
          <input type="checkbox" checked={fitting} onChange={() => setFitting(!fitting)} /> only what fits here
        </label>
      </form>
      {matching.length === 0 && <Empty title="No model of the library matches">Any repository of the hub can be loaded by its reference, below.</Empty>}
      {matching.length > 0 && (
        <table class="grid library">
          <thead>
            <tr>
              <th>Model</th>
              <th class="number">Size</th>
              <th class="number">Needs</th>
              <th>Here</th>
              <th class="number">Tokens/s (guess)</th>
              <th class="number">Context</th>
              <th>Abilities</th>
              <th>License</th>
              <th>
                <span class="hidden">Actions</span>
              </th>
            </tr>
          </thead>
          <tbody>
            {shown.map((entry) => (
              <Row key={entry.name} entry={entry} plan={plan} pulled={pulled} />
            ))}
          </tbody>
        </table>
      )}
      {matching.length > shown.length && <Button label={`Show all ${matching.length}`} onClick={() => setAll(true)} />}
      <p class="hint">
        Sizes and needs are estimates. Tokens/s is a guess for one stream on the CPU: the rate of this machine's memory over the
        bytes that a token needs. <code>headrace tune</code> measures it.
      </p>
    </>
  );
}

function matches(entry: LibraryEntry, text: string): boolean {
  const known = [entry.name, entry.title, entry.about, entry.license, entry.task, ...entry.abilities].join(" ").toLowerCase();
  return text.toLowerCase().split(/\s+/).every((word) => known.includes(word));
}

function Row({ entry, plan, pulled }: { entry: LibraryEntry; plan: (model: string) => void; pulled: () => void }) {
  return (
    <tr>
      <th scope="row" data-label="Model">
        {entry.name}
        <span class="sub">
          {entry.title}: {entry.about}
        </span>
      </th>
      <td data-label="Size" class="number">
        {bytes(entry.size)}
        <span class="sub">{entry.quantization}</span>
      </td>
      <td data-label="Needs" class="number">
        {memoryText(entry.needs) || "–"}
      </td>
      <td data-label="Here" title={entry.reason}>
        <Badge state={entry.fits ? "fits" : "too large"} />
        {entry.stored && <span class="sub">on the disk</span>}
      </td>
      <td data-label="Tokens/s (guess)" class="number">
        {entry.tokens_per_second === null ? "–" : `~${guess(entry.tokens_per_second)}`}
      </td>
      <td data-label="Context" class="number">
        {contextText(entry.context_length)}
      </td>
      <td data-label="Abilities">{entry.abilities.join(", ") || (entry.task === "generate" ? "–" : TASKS[entry.task])}</td>
      <td data-label="License">{entry.license.replaceAll("-", "\u2011")}</td>
      <td class="actions">
        <Pull entry={entry} plan={plan} pulled={pulled} />
      </td>
    </tr>
  );
}

/** A context in units of 1024 tokens, as those of models are. */
function contextText(tokens: number): string {
  return tokens % 1024 === 0 ? `${tokens / 1024}K` : count(tokens);
}

/** Two digits: more would look like a measurement. */
function guess(value: number): string {
  return count(Number(value.toPrecision(2)));
}

function Pull({ entry, plan, pulled }: { entry: LibraryEntry; plan: (model: string) => void; pulled: () => void }) {
  const [state, setState] = useState<PullState | null>(null);
  const [problem, setProblem] = useState<string | null>(null);
  const start = async () => {
    setProblem(null);
    setState({ status: "asking" });
    try {
      await pull(entry.name, setState);
      await check();
      pulled();
    } catch (error) {
      setProblem(messageOf(error));
    }
    setState(null);
    refresh();
  };
  const title = entry.stored ? "Load" : "Download";
  return (
    <>
      <div class="buttons">
        <Button
          label={title}
          aria-label={`${entry.stored ? "Load" : "Download and load"} ${entry.name}`}
          disabled={state !== null || !entry.fits}
          onClick={() => void start()}
        />
        <Button icon="search" bare label={`What loading ${entry.name} needs`} onClick={() => plan(entry.name)} />
      </div>
      {state && <Progress name={entry.name} state={state} />}
      {problem && (
        <p class="sub bad" role="alert">
          {problem}
        </p>
      )}
    </>
  );
}

function Progress({ name, state }: { name: string; state: PullState }) {
  const { status, completed = 0, total = 0 } = state;
  return (
    <span class="sub progress" role="status">
      <span>
        {status.replace(` ${name}`, "")}
        {total > 0 ? ` ${bytes(completed)} of ${bytes(total)}` : " …"}
      </span>
      {total > 0 && <progress aria-label={`${status} ${name}`} value={completed} max={total} />}
    </span>
  );
}

/** Download, load and serve a model; it goes on if the page is left. */
async function pull(model: string, show: (state: PullState) => void): Promise<void> {
  const response = await send("/api/pull", { method: "POST", body: JSON.stringify({ model }) });
  for await (const line of lines(response)) {
    const state: PullState & { error?: string } = JSON.parse(line);
    if (state.error) throw new Error(state.error);
    show(state);
  }
}
