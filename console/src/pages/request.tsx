/** One request with its steps, and two beside each other. */

import { useEffect, useState } from "preact/hooks";

import { getJson, isAbort, messageOf } from "../api";
import { bytes, count, draftText, iso, ms, rate } from "../format";
import { replay } from "../playground/replay";
import { go, link } from "../route";
import type { Span, Trace } from "../types";
import { Badge, Button, CopyButton, Empty, Facts, Loading, PageHead, Problem } from "../ui";

function useTrace(id: string): [Trace | null, string | null] {
  const [trace, setTrace] = useState<Trace | null>(null);
  const [problem, setProblem] = useState<string | null>(null);
  useEffect(() => {
    const call = new AbortController();
    setTrace(null);
    setProblem(null);
    getJson<Trace>(`/admin/traces/${encodeURIComponent(id)}`, call.signal).then(
      setTrace,
      (error) => isAbort(error) || setProblem(messageOf(error)),
    );
    return () => call.abort();
  }, [id]);
  return [trace, problem];
}

export function RequestView({ id }: { id: string }) {
  const [trace, problem] = useTrace(id);
  return (
    <>
      <PageHead title="Request" note={<code>{id}</code>}>
        {trace && <ReplayButton trace={trace} />}
        {trace && <CopyButton label="Copy as JSON" text={() => JSON.stringify(trace, null, 2)} />}
        <a class="button plain" href={link("requests")}>
          All requests
        </a>
      </PageHead>
      {problem ? <Problem text={problem} /> : trace ? <Details trace={trace} /> : <Loading />}
    </>
  );
}

function ReplayButton({ trace }: { trace: Trace }) {
  const [problem, setProblem] = useState<string | null>(null);
  const has = trace.content?.asked !== undefined;
  const start = () => void replay(trace).then(() => go("playground"), (error) => setProblem(messageOf(error)));
  return (
    <>
      {problem && <span class="sub bad">{problem}</span>}
      <Button
        icon="again"
        label="Replay"
        disabled={!has}
        title={has ? "Open it in the playground" : "Its content is not kept: the setting telemetry.trace_content does that"}
        onClick={start}
      />
    </>
  );
}

function Details({ trace }: { trace: Trace }) {
  return (
    <>
      {trace.message && <Problem text={`${trace.error}: ${trace.message}`} />}
      <section class="panel">
        <FactsOf trace={trace} />
      </section>
      <section>
        <h2>Steps</h2>
        <Waterfall spans={trace.spans ?? []} />
      </section>
      {Object.keys(trace.parameters ?? {}).length > 0 && (
        <section>
          <h2>Parameters</h2>
          <div class="panel">
            <Facts facts={Object.entries(trace.parameters!).map(([name, value]) => [name, <code>{JSON.stringify(value)}</code>])} />
          </div>
        </section>
      )}
      <ContentView trace={trace} />
    </>
  );
}

function FactsOf({ trace }: { trace: Trace }) {
  const { metrics } = trace;
  const { usage } = metrics;
  return (
    <Facts
      facts={[
        ["Outcome", <Badge state={trace.outcome} />],
        ["Finished by", trace.finish_reasons?.join(", ")],
        ["Received", iso(trace.time)],
        ["Kind", trace.operation],
        ["Model", trace.model],
        ["Engine", metrics.engine],
        ["Key", trace.client && <code>{trace.client}</code>],
        ["Trace", <code>{trace.trace_id}</code>],
        ["Prompt", `${count(usage.prompt_tokens)} tokens, ${count(usage.cached_tokens)} cached`],
        ["Answer", `${count(usage.completion_tokens)} tokens`],
        ["Thinking", usage.reasoning_tokens ? `${count(usage.reasoning_tokens)} tokens of it` : ""],
        ["Drafts", usage.drafted_tokens ? draftText(usage) : ""],
        ["Queue", ms(metrics.queue_ms)],
        ["Load", metrics.load_ms ? ms(metrics.load_ms) : ""],
        ["First token", ms(metrics.time_to_first_token_ms)],
        ["Prefill", metrics.prefill_ms == null ? "" : `${ms(metrics.prefill_ms)}, ${rate(metrics.prefill_tokens_per_second)} tokens/s`],
        ["Per token", metrics.time_per_output_token_ms == null ? "" : `${ms(metrics.time_per_output_token_ms)}, ${rate(metrics.decode_tokens_per_second)} tokens/s`],
        ["Gaps", metrics.inter_token_ms ? `p50 ${ms(metrics.inter_token_ms.p50)}, p99 ${ms(metrics.inter_token_ms.p99)}, max ${ms(metrics.inter_token_ms.max)}` : ""],
        ["Total", ms(metrics.total_ms)],
        ...(metrics.devices ?? []).map((use): [string, string] => [use.name, deviceText(use)]),
      ]}
    />
  );
}

function deviceText(use: Trace["metrics"]["devices"][number]): string {
  const parts = [`memory ${bytes(use.worker_mean)}, peak ${bytes(use.worker_peak)}`];
  if (use.busy_mean != null) parts.push(`busy ${(100 * use.busy_mean).toFixed(0)} %`);
  if (use.joules != null) parts.push(`${use.joules.toFixed(1)} J`);
  return parts.join("; ");
}

const STEPS: Record<string, string> = {
  "headrace.queue": "queue",
  "headrace.load": "load",
  "headrace.prefill": "prefill",
  "headrace.decode": "decode",
};

/** Each step below its parent, on one scale of time. */
function Waterfall({ spans }: { spans: Span[] }) {
  if (spans.length === 0) return <Empty title="No steps are kept">A record that is too long is kept without them.</Empty>;
  const rows = nested(spans);
  const begin = Math.min(...spans.map((span) => span.start_ms));
  const whole = Math.max(...spans.map((span) => span.start_ms + span.ms)) - begin || 1;
  return (
    <ol class="waterfall">
      {rows.map(({ span, depth }) => (
        <li key={span.span_id}>
          <details>
            <summary>
              <span class={`step-name depth-${Math.min(depth, 4)}`}>{span.name.replace("headrace.", "")}</span>
              <svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">
                <rect class="ground" width="100" height="8" />
                <rect
                  class={`part step-${span.failed ? "failed" : (STEPS[span.name] ?? "other")}`}
                  x={(100 * (span.start_ms - begin)) / whole}
                  width={Math.max(0.4, (100 * span.ms) / whole)}
                  height="8"
                />
              </svg>
              <span class="number">{ms(span.ms)}</span>
            </summary>
            <Facts
              facts={[
                ["starts after", ms(span.start_ms - begin)],
                ...Object.entries(span.attributes ?? {}).map(([name, value]): [string, string] => [name, String(value)]),
              ]}
            />
          </details>
        </li>
      ))}
    </ol>
  );
}

function nested(spans: Span[]): { span: Span; depth: number }[] {
  const known = new Set(spans.map((span) => span.span_id));
  const rows: { span: Span; depth: number }[] = [];
  const add = (parent: string | null, depth: number) => {
    const children = spans.filter((span) => (known.has(span.parent_id) ? span.parent_id === parent : parent === null));
    for (const span of children.sort((a, b) => a.start_ms - b.start_ms)) {
      rows.push({ span, depth });
      if (depth < 16) add(span.span_id, depth + 1);
    }
  };
  add(null, 0);
  return rows;
}

function ContentView({ trace }: { trace: Trace }) {
  if (!trace.content) return null;
  const { asked, answered } = trace.content;
  return (
    <section>
      <h2>Content</h2>
      <pre class="plain panel" tabIndex={0}>
        {typeof asked === "string" ? asked : JSON.stringify(asked, null, 2)}
      </pre>
      {answered?.map((text, index) => (
        <pre class="plain panel" key={index} tabIndex={0}>
          {text}
        </pre>
      ))}
    </section>
  );
}

type Figure = [name: string, value: (trace: Trace) => number | null, text: (value: number) => string];

const FIGURES: Figure[] = [
  ["Queue", (t) => t.metrics.queue_ms, ms],
  ["Load", (t) => t.metrics.load_ms, ms],
  ["First token", (t) => t.metrics.time_to_first_token_ms, ms],
  ["Prefill", (t) => t.metrics.prefill_ms, ms],
  ["Prefill, tokens/s", (t) => t.metrics.prefill_tokens_per_second, rate],
  ["Per token", (t) => t.metrics.time_per_output_token_ms, ms],
  ["Tokens/s", (t) => t.metrics.decode_tokens_per_second, rate],
  ["Total", (t) => t.metrics.total_ms, ms],
  ["Prompt tokens", (t) => t.metrics.usage.prompt_tokens, count],
  ["Cached tokens", (t) => t.metrics.usage.cached_tokens, count],
  ["Answer tokens", (t) => t.metrics.usage.completion_tokens, count],
  ["Drafted tokens", (t) => t.metrics.usage.drafted_tokens || null, count],
  ["Accepted tokens", (t) => (t.metrics.usage.drafted_tokens ? t.metrics.usage.accepted_tokens : null), count],
];

export function Comparison({ ids }: { ids: [string, string] }) {
  const [left, leftProblem] = useTrace(ids[0]);
  const [right, rightProblem] = useTrace(ids[1]);
  const problem = leftProblem ?? rightProblem;
  return (
    <>
      <PageHead title="Two requests">
        <a class="button plain" href={link("requests")}>
          All requests
        </a>
      </PageHead>
      {problem && <Problem text={problem} />}
      {!problem && !(left && right) && <Loading />}
      {left && right && <Compared left={left} right={right} />}
    </>
  );
}

function Compared({ left, right }: { left: Trace; right: Trace }) {
  return (
    <>
      <div class="scroll" tabIndex={0} role="region" aria-label="Figures of both">
        <table class="plain-grid">
          <thead>
            <tr>
              <th>Figure</th>
              {[left, right].map((trace) => (
                <th key={trace.id} class="number">
                  <a href={link("requests", trace.id)}>
                    <code>{trace.id.slice(0, 12)}</code>
                  </a>
                  <span class="sub">{trace.model}</span>
                </th>
              ))}
              <th class="number">Difference</th>
            </tr>
          </thead>
          <tbody>
            {FIGURES.map(([name, value, text]) => {
              const [a, b] = [value(left), value(right)];
              if (a == null && b == null) return null;
              return (
                <tr key={name}>
                  <th scope="row">{name}</th>
                  <td class="number">{a == null ? "–" : text(a)}</td>
                  <td class="number">{b == null ? "–" : text(b)}</td>
                  <td class="number">{difference(a, b)}</td>
                </tr>
              );
            })}
          </tbody>
        </table>
      </div>
      <div class="pair">
        {[left, right].map((trace) => (
          <section key={trace.id}>
            <h2>
              {trace.model} · <code>{trace.id.slice(0, 12)}</code>
            </h2>
            <Waterfall spans={trace.spans ?? []} />
          </section>
        ))}
      </div>
    </>
  );
}

function difference(a: number | null, b: number | null): string {
  if (a == null || b == null || a === 0) return "–";
  const percent = (100 * (b - a)) / a;
  return `${percent > 0 ? "+" : ""}${Math.abs(percent) < 10 ? percent.toFixed(1) : percent.toFixed(0)} %`;
}
