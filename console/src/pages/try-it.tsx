/** A form that sends a request to a route, and shows the answer as it arrives. */

import { useEffect, useRef, useState } from "preact/hooks";

import { currentKey, isAbort, messageOf } from "../api";
import { ms } from "../format";
import { Code } from "../markdown";
import type { Operation } from "../openapi";
import { quoted } from "../playground/request";
import { Badge, Button, Field } from "../ui";

type Values = Record<string, string>;
const LONGEST = 200_000;

/** The address of a request, with its parameters. */
function addressOf(operation: Operation, values: Values): string {
  const query = new URLSearchParams();
  let path = operation.path;
  for (const { name, in: place } of operation.parameters) {
    const value = values[name] ?? "";
    if (place === "path") path = path.replace(`{${name}}`, value.split("/").map(encodeURIComponent).join("/"));
    else if (value) query.set(name, value);
  }
  return query.size > 0 ? `${path}?${query}` : path;
}

/** A request as a command. */
export function curlOf(operation: Operation, body: unknown, values: Values, needsKey: boolean): string {
  const lines = [`curl ${operation.method === "GET" ? "" : `-X ${operation.method} `}${quoted(location.origin + addressOf(operation, values))}`];
  if (needsKey) lines.push('-H "Authorization: Bearer $HEADRACE_API_KEY"');
  if (operation.form) lines.push(...Object.entries(body as object).map(([name, value]) => `-F ${quoted(`${name}=${value}`)}`));
  else if (body !== null) lines.push("-H 'Content-Type: application/json'", `-d ${quoted(typeof body === "string" ? body : JSON.stringify(body))}`);
  return lines.join(" \\\n  ");
}

interface Result {
  status: number;
  took: number;
  kind: string;
  text: string;
  done: boolean;
}

interface Props {
  operation: Operation;
  sample: Record<string, unknown> | null;
  examples: Values;
}

export function TryIt({ operation, sample, examples }: Props) {
  const [body, setBody] = useState(sample ? JSON.stringify(sample, null, 2) : "");
  const [values, setValues] = useState<Values>(examples);
  const [file, setFile] = useState<File | null>(null);
  const [result, setResult] = useState<Result | null>(null);
  const [problem, setProblem] = useState<string | null>(null);
  const call = useRef<AbortController | null>(null);
  useEffect(() => () => call.current?.abort(), []);
  const running = result !== null && !result.done;

  const submit = async (event: Event) => {
    event.preventDefault();
    call.current?.abort();
    const current = (call.current = new AbortController());
    setProblem(null);
    setResult({ status: 0, took: 0, kind: "", text: "", done: false });
    try {
      await run(operation, addressOf(operation, values), operation.form ? formOf(sample, file) : sample ? body : null, current.signal, setResult);
    } catch (error) {
      setResult((last) => (last && last.status > 0 ? { ...last, done: true } : null));
      if (!isAbort(error)) setProblem(messageOf(error));
    }
  };

  return (
    <form class="try" onSubmit={(event) => void submit(event)}>
      {operation.parameters.map(({ name, required }) => (
        <Field key={name} label={name}>
          <input type="text" spellcheck={false} required={required} value={values[name] ?? ""} onInput={(event) => setValues({ ...values, [name]: event.currentTarget.value })} />
        </Field>
      ))}
      {operation.form && (
        <Field label="file">
          <input type="file" required onChange={(event) => setFile(event.currentTarget.files?.[0] ?? null)} />
        </Field>
      )}
      {sample && !operation.form && (
        <Field label="Body">
          <textarea class="mono" rows={Math.min(14, body.split("\n").length + 1)} spellcheck={false} value={body} onInput={(event) => setBody(event.currentTarget.value)} />
        </Field>
      )}
      <Code text={curlOf(operation, operation.form ? sample : sample ? body : null, values, currentKey() !== null)} language="sh" />
      <div class="buttons">
        <Button type="submit" kind="primary" label="Send" disabled={running} />
        {running && <Button icon="stop" label="Stop" onClick={() => call.current?.abort()} />}
        <span class="note">{currentKey() === null ? "Without a key." : "With the key of this tab."}</span>
      </div>
      {problem && (
        <p class="error" role="alert">
          {problem}
        </p>
      )}
      {result && result.status > 0 && (
        <div class="result">
          <p>
            <Badge state={result.status < 400 ? "ok" : "failed"} /> {result.status} <code>{result.kind}</code> <span class="note">{ms(result.took)}</span>
          </p>
          <pre class="plain" tabIndex={0} aria-label="Answer">
            {result.text}
          </pre>
        </div>
      )}
    </form>
  );
}

function formOf(sample: Record<string, unknown> | null, file: File | null): FormData {
  const form = new FormData();
  for (const [name, value] of Object.entries(sample ?? {})) if (name !== "file") form.set(name, String(value));
  if (file) form.set("file", file);
  return form;
}

async function run(operation: Operation, address: string, body: string | FormData | null, signal: AbortSignal, show: (result: Result) => void): Promise<void> {
  const headers = new Headers();
  const key = currentKey();
  if (key !== null) headers.set("authorization", `Bearer ${key}`);
  if (typeof body === "string") headers.set("content-type", "application/json");
  const started = performance.now();
  const response = await fetch(address, { method: operation.method, headers, body, signal, cache: "no-store" });
  const kind = response.headers.get("content-type") ?? "";
  let text = "";
  const report = (done: boolean) =>
    show({ status: response.status, took: performance.now() - started, kind, done, text: done ? pretty(text, kind) : text });
  if (response.body) {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const { value, done } = await reader.read();
      if (done || text.length > LONGEST) break;
      text += value;
      report(false);
    }
    void reader.cancel().catch(() => undefined);
  }
  report(true);
}

function pretty(text: string, kind: string): string {
  if (!kind.startsWith("application/json")) return text;
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}
