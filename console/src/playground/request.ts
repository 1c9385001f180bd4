/** The body of a chat request, the stream of its answer, and the same request for other programs. */

import { ApiError, events, getJson, isAbort, messageOf, send } from "../api";
import type { Metrics } from "../types";
import type { AnswerTurn, Lane, Settings, Turn } from "./conversation";

type Json = Record<string, unknown>;

/** Return the body for a lane's turns. Raises Error if a setting cannot be read. */
export function bodyOf(lane: Lane, settings: Settings): Json {
  const messages = lane.turns.map(message);
  if (settings.system.trim()) messages.unshift({ role: "system", content: settings.system });
  const body: Json = { model: lane.model, messages };
  for (const name of ["temperature", "top_p", "max_tokens", "seed"] as const) {
    if (settings[name].trim()) body[name] = number(name, settings[name]);
  }
  const stop = settings.stop.split("\n").filter(Boolean);
  if (stop.length > 0) body.stop = stop;
  if (settings.tools.trim()) body.tools = parsed("Tools", settings.tools, Array.isArray);
  return settings.extra.trim() ? { ...body, ...(parsed("Further fields", settings.extra, isObject) as Json) } : body;
}

function number(name: string, text: string): number {
  const value = Number(text);
  if (!Number.isFinite(value)) throw new Error(`${name} is not a number: ${text}`);
  return value;
}

function isObject(value: unknown): boolean {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function parsed(name: string, text: string, fits: (value: unknown) => boolean): unknown {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new Error(`${name}: this is not JSON (${messageOf(error)}).`);
  }
  if (!fits(value)) throw new Error(`${name}: a JSON ${name === "Tools" ? "array" : "object"} is needed.`);
  return value;
}

function message(turn: Turn): Json {
  switch (turn.role) {
    case "user": {
      if (turn.images.length === 0) return { role: "user", content: turn.text };
      const pictures = turn.images.map((url) => ({ type: "image_url", image_url: { url } }));
      return { role: "user", content: [{ type: "text", text: turn.text }, ...pictures] };
    }
    case "tool":
      return { role: "tool", tool_call_id: turn.id, content: turn.text };
    case "assistant": {
      if (turn.calls.length === 0) return { role: "assistant", content: turn.text };
      const calls = turn.calls.map((call) => ({
        id: call.id,
        type: "function",
        function: { name: call.name, arguments: call.arguments },
      }));
      return { role: "assistant", content: turn.text || null, tool_calls: calls };
    }
  }
}

interface Chunk {
  choices?: {
    delta?: {
      content?: string | null;
      reasoning_content?: string | null;
      reasoning?: string | null;
      tool_calls?: { index: number; id?: string; function?: { name?: string; arguments?: string } }[];
    };
    finish_reason?: string | null;
  }[];
  metrics?: Metrics;
  error?: { message: string };
}

export function emptyAnswer(): AnswerTurn {
  return { role: "assistant", text: "", thinking: "", calls: [], metrics: null, finish: "", error: null };
}

/** Add a chunk to an answer, in place. */
export function add(answer: AnswerTurn, chunk: Chunk): void {
  if (chunk.error) answer.error = chunk.error.message;
  if (chunk.metrics) answer.metrics = chunk.metrics;
  const choice = chunk.choices?.[0];
  const delta = choice?.delta ?? {};
  answer.text += delta.content ?? "";
  answer.thinking += delta.reasoning_content ?? delta.reasoning ?? "";
  for (const part of delta.tool_calls ?? []) {
    const call = (answer.calls[part.index] ??= { id: "", name: "", arguments: "" });
    call.id += part.id ?? "";
    call.name += part.function?.name ?? "";
    call.arguments += part.function?.arguments ?? "";
  }
  if (choice?.finish_reason) answer.finish = choice.finish_reason;
}

/** Stream an answer; `report` is called after each change, with the stage before the first token. */
export async function stream(
  body: Json,
  signal: AbortSignal,
  report: (answer: AnswerTurn, stage: string) => void,
): Promise<AnswerTurn> {
  const answer = emptyAnswer();
  const seen = new Seen();
  let id: string | null = null;
  try {
    const options = { stream: true, stream_options: { include_usage: true } };
    const response = await send("/v1/chat/completions", {
      method: "POST",
      signal,
      body: JSON.stringify({ ...body, ...options }),
    });
    id = response.headers.get("x-request-id");
    for await (const { data, comment } of events(response)) {
      if (comment !== null) report(answer, comment);
      else if (data !== null && data !== "[DONE]") {
        add(answer, JSON.parse(data));
        seen.chunk();
        report(answer, "");
      }
    }
    if (!answer.finish && !answer.error) answer.error = "The answer ended too early.";
  } catch (error) {
    if (isAbort(error)) {
      answer.finish = "stopped";
      answer.metrics = (await tracedMetrics(id)) ?? seen.metrics();
    } else answer.error = error instanceof ApiError ? error.message : `The answer was cut off: ${messageOf(error)}`;
  }
  return answer;
}

/** What this browser sees of an answer: a chunk counts as a token. */
class Seen {
  private readonly began = performance.now();
  private first: number | null = null;
  private last = 0;
  private chunks = 0;

  chunk(): void {
    this.last = performance.now() - this.began;
    this.first ??= this.last;
    this.chunks += 1;
  }

  /** Null before the first chunk. */
  metrics(): Metrics | null {
    if (this.first === null) return null;
    const decode = this.last - this.first;
    return {
      started_at: 0,
      queue_ms: null,
      load_ms: 0,
      time_to_first_token_ms: this.first,
      prefill_ms: this.first,
      prefill_tokens_per_second: null,
      time_per_output_token_ms: null,
      decode_tokens_per_second: decode > 0 ? ((this.chunks - 1) * 1000) / decode : null,
      inter_token_ms: null,
      total_ms: performance.now() - this.began,
      usage: { prompt_tokens: 0, cached_tokens: 0, completion_tokens: this.chunks, reasoning_tokens: 0, drafted_tokens: 0, accepted_tokens: 0 },
      devices: [],
      engine: "",
      worker: "",
      continuations: 0,
    };
  }
}

const TRIES = 5;
const PAUSE_MS = 200;

/** The service's figures of a request that was stopped, null where this key may not read them. */
async function tracedMetrics(id: string | null): Promise<Metrics | null> {
  if (id === null) return null;
  for (let tries = 0; tries < TRIES; tries += 1) {
    // It is written once the service has seen that the connection is gone.
    await new Promise((done) => setTimeout(done, PAUSE_MS));
    try {
      return (await getJson<{ metrics: Metrics }>(`/admin/traces/${id}`)).metrics;
    } catch (error) {
      if (!(error instanceof ApiError) || error.status !== 404) return null;
    }
  }
  return null;
}

const PLACEHOLDER = "$HEADRACE_API_KEY";

/** Of the bytes that an argument of a program may have on Linux, 128 KiB; a letter has up to four. */
const LONGEST_ARGUMENT = 30_000;

/** The request as a command; a long one is read from its input, as an argument may not be so long. */
export function asCurl(body: Json, needsKey: boolean): string {
  const json = JSON.stringify(body, null, 2);
  const long = json.length > LONGEST_ARGUMENT;
  const lines = [
    `curl ${location.origin}/v1/chat/completions`,
    "-H 'Content-Type: application/json'",
    ...(needsKey ? [`-H "Authorization: Bearer ${PLACEHOLDER}"`] : []),
    long ? `--data-binary @- <<'END'\n${json}\nEND` : `-d ${quoted(json)}`,
  ];
  return lines.join(" \\\n  ");
}

/** A text as one word of a shell. */
export function quoted(text: string): string {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

/** The request as a program with the package openai. */
export function asPython(body: Json, needsKey: boolean): string {
  const key = needsKey ? 'os.environ["HEADRACE_API_KEY"]' : '"none"';
  const { model, messages, temperature, top_p, max_tokens, seed, stop, tools, stream: _, ...rest } = body;
  const known = { model, messages, temperature, top_p, max_tokens, seed, stop, tools };
  const fields = Object.entries(known).filter(([, value]) => value !== undefined);
  const lines = fields.map(([name, value]) => `    ${name}=${python(value, 1)},`);
  if (Object.keys(rest).length > 0) lines.push(`    extra_body=${python(rest, 1)},`);
  return [
    ...(needsKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${location.origin}/v1", api_key=${key})`,
    "stream = client.chat.completions.create(",
    ...lines,
    "    stream=True,",
    ")",
    "for chunk in stream:",
    "    for choice in chunk.choices:",
    '        print(choice.delta.content or "", end="", flush=True)',
    ...(tools === undefined ? [] : CALLS),
    "print()",
    "",
  ].join("\n");
}

const CALLS = [
  "        for call in choice.delta.tool_calls or []:",
  '            print(call.function.name or "", call.function.arguments or "", end="", flush=True)',
];

function python(value: unknown, depth: number): string {
  const indent = "    ".repeat(depth);
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) {
    if (value.length === 0) return "[]";
    return `[\n${value.map((item) => `${indent}    ${python(item, depth + 1)},\n`).join("")}${indent}]`;
  }
  if (typeof value === "object") {
    const entries = Object.entries(value as Json);
    if (entries.length === 0) return "{}";
    return `{\n${entries.map(([name, item]) => `${indent}    ${JSON.stringify(name)}: ${python(item, depth + 1)},\n`).join("")}${indent}}`;
  }
  return JSON.stringify(value);
}
