/** The turns of a conversation, and the figures under each answer. */

import { useState } from "preact/hooks";

import { count, draftText, ms, rate } from "../format";
import { Code, Markdown } from "../markdown";
import { memo } from "../memo";
import type { Metrics } from "../types";
import { Button, CopyButton } from "../ui";
import type { AnswerTurn, Call, ToolTurn, UserTurn } from "./conversation";

export function UserView({ turn, edit }: { turn: UserTurn; edit: (() => void) | null }) {
  return (
    <article class="turn user" aria-label="You">
      <div class="bubble">
        {turn.images.map((url, index) => (
          <img key={index} src={url} alt={`Picture ${index + 1}`} />
        ))}
        {turn.text && <p class="text">{turn.text}</p>}
      </div>
      {edit && <Button kind="quiet" icon="edit" bare label="Edit this message" onClick={edit} />}
    </article>
  );
}

export const ToolView = memo(function ToolView({ turn }: { turn: ToolTurn }) {
  return (
    <article class="turn tool" aria-label="Result of a tool">
      <p class="turn-head">Result of {turn.name || "a tool"}</p>
      <pre class="plain">{turn.text}</pre>
    </article>
  );
});

interface AnswerProps {
  turn: AnswerTurn;
  model: string;
  /** The stage before the first token; null when the answer has ended. */
  stage: string | null;
  last: boolean;
  again: () => void;
  answerCalls: (results: string[]) => void;
  curl: () => string;
  python: () => string;
}

export function AnswerView({ turn, model, stage, last, again, answerCalls, curl, python }: AnswerProps) {
  const writing = stage !== null;
  const nothing = !turn.text && !turn.thinking && turn.calls.length === 0;
  return (
    <article class={`turn answer${writing ? " writing" : ""}`} aria-label={`Answer of ${model}`} aria-busy={writing}>
      {turn.thinking && (
        <details class="thinking" open={writing && !turn.text}>
          <summary>{writing && !turn.text ? "Thinking …" : "Thinking"}</summary>
          <Markdown text={turn.thinking} />
        </details>
      )}
      {turn.text && <Markdown text={turn.text} />}
      {writing && nothing && <p class="stage">{stageText(stage)}</p>}
      {turn.calls.map((call, index) => (
        <CallView key={index} call={call} />
      ))}
      {!writing && last && turn.calls.length > 0 && turn.finish === "tool_calls" && <Results calls={turn.calls} send={answerCalls} />}
      {turn.error && (
        <p class="error" role="alert">
          {turn.error}
        </p>
      )}
      {!writing && <Foot turn={turn} last={last} again={again} curl={curl} python={python} />}
    </article>
  );
}

function stageText(stage: string): string {
  const [word = "", percent = ""] = stage.split(" ");
  const texts: Record<string, string> = {
    sending: "Sending",
    waiting: "Waiting",
    queued: "Waiting for a free slot",
    loading: "Loading the model",
    downloading: "Downloading the model",
    prefill: "Reading the prompt",
  };
  return `${texts[word] ?? (word || "Writing")}${percent ? ` ${percent}` : ""} …`;
}

function CallView({ call }: { call: Call }) {
  return (
    <div class="call">
      <p class="turn-head">
        Calls <strong>{call.name}</strong>
      </p>
      <Code text={pretty(call.arguments)} language="json" />
    </div>
  );
}

function pretty(text: string): string {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

/** A form for the results of calls, which nothing here runs. */
function Results({ calls, send }: { calls: Call[]; send: (results: string[]) => void }) {
  const [results, setResults] = useState(() => calls.map(() => ""));
  const submit = (event: Event) => {
    event.preventDefault();
    send(results);
  };
  return (
    <form class="results" onSubmit={submit}>
      {calls.map((call, index) => (
        <label class="field" key={index}>
          <span class="name">Result of {call.name}</span>
          <textarea
            rows={2}
            spellcheck={false}
            value={results[index]}
            onInput={(event) => setResults(results.map((text, place) => (place === index ? event.currentTarget.value : text)))}
          />
        </label>
      ))}
      <Button type="submit" kind="primary" label={calls.length > 1 ? "Send the results" : "Send the result"} />
    </form>
  );
}

interface FootProps {
  turn: AnswerTurn;
  last: boolean;
  again: () => void;
  curl: () => string;
  python: () => string;
}

function Foot({ turn, last, again, curl, python }: FootProps) {
  return (
    <footer>
      {turn.finish === "stopped" && <p class="note">Stopped.{turn.metrics?.engine === "" && " The figures are those of this browser; a chunk counts as a token."}</p>}
      {turn.finish === "length" && <p class="note">The limit of tokens was reached.</p>}
      {turn.metrics && <Figures metrics={turn.metrics} />}
      <div class="buttons">
        {last && <Button kind="quiet" icon="again" label="Regenerate" onClick={again} />}
        {turn.text && <CopyButton text={() => turn.text} />}
        <CopyButton label="curl" text={curl} />
        <CopyButton label="Python" text={python} />
      </div>
    </footer>
  );
}

/** Where the time of an answer went: queue, load, prefill, decode. */
export function Figures({ metrics }: { metrics: Metrics }) {
  const { usage } = metrics;
  const before = (metrics.queue_ms ?? 0) + metrics.load_ms + (metrics.prefill_ms ?? 0);
  const parts: [string, number][] = [
    ["queue", metrics.queue_ms ?? 0],
    ["load", metrics.load_ms],
    ["prefill", metrics.prefill_ms ?? 0],
    ["decode", Math.max(0, metrics.total_ms - before)],
  ];
  const whole = parts.reduce((sum, [, value]) => sum + value, 0) || 1;
  let start = 0;
  return (
    <div class="figures">
      <svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" role="img" aria-label={parts.map(([name, value]) => `${name} ${ms(value)}`).join(", ")}>
        {parts.map(([name, value]) => {
          const place = start;
          start += (100 * value) / whole;
          return (
            <rect key={name} class={`part step-${name}`} x={place} width={(100 * value) / whole} height="8">
              <title>{`${name} ${ms(value)}`}</title>
            </rect>
          );
        })}
      </svg>
      <p class="numbers">
        {parts
          .filter(([, value]) => value >= 0.05)
          .map(([name, value]) => (
            <span key={name} class={`key step-${name}`}>
              {name} {ms(value)}
            </span>
          ))}
      </p>
      <p class="numbers">
        <span>first token {ms(metrics.time_to_first_token_ms)}</span>
        <span>{rate(metrics.decode_tokens_per_second)} tokens/s</span>
        <span>
          {usage.prompt_tokens > 0 && `${count(usage.prompt_tokens)} in`}{usage.cached_tokens > 0 ? ` (${count(usage.cached_tokens)} cached)` : ""}
          {usage.prompt_tokens > 0 && ", "}
          {count(usage.completion_tokens)} out
        </span>
        {usage.drafted_tokens > 0 && <span>{draftText(usage)}</span>}
        <span>total {ms(metrics.total_ms)}</span>
      </p>
    </div>
  );
}
