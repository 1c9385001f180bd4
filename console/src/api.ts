/** Calls of the service's API, with the key of this tab. */

import { span } from "./format";

const STORED = "headrace.key";
let key: string | null = stored();

function stored(): string | null {
  try {
    return sessionStorage.getItem(STORED);
  } catch {
    return null;
  }
}

export function currentKey(): string | null {
  return key;
}

/** Keep a key for this tab, until it is closed; null forgets it. */
export function setKey(next: string | null): void {
  key = next;
  try {
    if (next === null) sessionStorage.removeItem(STORED);
    else sessionStorage.setItem(STORED, next);
  } catch {
    // Without a storage it lasts as long as the page.
  }
}

/** A refused or failed request, with the message of the service. */
export class ApiError extends Error {
  constructor(
    message: string,
    readonly status: number,
  ) {
    super(message);
  }
}

export function isAbort(error: unknown): boolean {
  return error instanceof DOMException && error.name === "AbortError";
}

export function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

let refused: (error: ApiError) => void = () => undefined;

/** Call a function whenever the service does not take this tab's key, or wants one. */
export function whenRefused(listener: (error: ApiError) => void): void {
  refused = listener;
}

/** Send a request; raises ApiError unless the status is below 400. */
export async function send(path: string, options: RequestInit = {}): Promise<Response> {
  const headers = new Headers(options.headers);
  const used = key;
  if (used !== null) headers.set("authorization", `Bearer ${used}`);
  if (options.body != null) headers.set("content-type", "application/json");
  let response: Response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (isAbort(error)) throw error;
    throw new ApiError("The service cannot be reached.", 0);
  }
  if (response.status < 400) return response;
  const error = await refusal(response);
  // With another key since then, it says nothing.
  if (error.status === 401 && used === key) refused(error);
  throw error;
}

async function refusal(response: Response): Promise<ApiError> {
  const text = await response.text();
  const wait = Number(response.headers.get("retry-after") ?? 0);
  const after = wait > 0 ? ` Try again in ${span(wait)}.` : "";
  try {
    const { error } = JSON.parse(text);
    return new ApiError(String(error.message ?? error) + after, response.status);
  } catch {
    return new ApiError((text || `Status ${response.status}`) + after, response.status);
  }
}

export async function getJson<T>(path: string, signal?: AbortSignal): Promise<T> {
  return (await send(path, signal ? { signal } : {})).json();
}

export async function post<T>(path: string, body: unknown): Promise<T> {
  return (await send(path, { method: "POST", body: JSON.stringify(body) })).json();
}

export interface Event {
  data: string | null;
  comment: string | null;
}

/** Yield the events and comments of a response with server-sent events. */
export async function* events(response: Response): AsyncGenerator<Event> {
  for await (const line of lines(response)) {
    if (line.startsWith("data:")) yield { data: line.slice(5).trimStart(), comment: null };
    else if (line.startsWith(":")) yield { data: null, comment: line.slice(1).trim() };
  }
}

/** Yield the lines of a response as they come. */
export async function* lines(response: Response): AsyncGenerator<string> {
  const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const parts = (rest + value).split("\n");
      rest = parts.pop() ?? "";
      yield* parts;
    }
    if (rest) yield rest;
  } finally {
    void reader.cancel().catch(() => undefined);
  }
}
