/** Conversations: their shape, and their place in this browser. */

import type { Metrics } from "../types";

export interface Call {
  id: string;
  name: string;
  arguments: string;
}

export interface UserTurn {
  role: "user";
  text: string;
  /** Pictures as data: URLs. */
  images: string[];
}

export interface ToolTurn {
  role: "tool";
  id: string;
  name: string;
  text: string;
}

export interface AnswerTurn {
  role: "assistant";
  text: string;
  thinking: string;
  calls: Call[];
  metrics: Metrics | null;
  /** `stop`, `length`, `tool_calls`; `stopped` by the user; empty while it is written. */
  finish: string;
  error: string | null;
}

export type Turn = UserTurn | ToolTurn | AnswerTurn;

/** One model's side of a conversation. */
export interface Lane {
  model: string;
  turns: Turn[];
}

export interface Settings {
  system: string;
  temperature: string;
  top_p: string;
  max_tokens: string;
  seed: string;
  stop: string;
  /** A JSON array of tools, or empty. */
  tools: string;
  /** A JSON object of further fields, or empty. */
  extra: string;
}

export interface Conversation {
  id: string;
  title: string;
  updated: number;
  settings: Settings;
  lanes: Lane[];
}

export const NO_SETTINGS: Settings = {
  system: "",
  temperature: "",
  top_p: "",
  max_tokens: "",
  seed: "",
  stop: "",
  tools: "",
  extra: "",
};

export function fresh(models: string[], settings = NO_SETTINGS): Conversation {
  return {
    id: identifier(),
    title: "",
    updated: Date.now(),
    settings,
    lanes: models.map((model) => ({ model, turns: [] })),
  };
}

function identifier(): string {
  return Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function isEmpty(conversation: Conversation): boolean {
  return conversation.lanes.every((lane) => lane.turns.length === 0);
}

const LARGEST = 2 ** 28;
const PICTURE = /^data:image\/(?:png|jpeg|gif|webp);base64,/;

/** The conversations of an exported file. Raises Error if it has none. */
export async function imported(file: File): Promise<Conversation[]> {
  if (file.size > LARGEST) throw new Error("It is too large.");
  let value: unknown;
  try {
    value = JSON.parse(await file.text());
  } catch {
    throw new Error("It is not JSON.");
  }
  const read = (Array.isArray(value) ? value : [value]).map(conversationOf);
  if (read.length === 0) throw new Error("It has no conversation.");
  return read;
}

type Fields = Record<string, unknown>;

function fields(value: unknown): Fields {
  return typeof value === "object" && value !== null ? (value as Fields) : {};
}

function list(value: unknown): unknown[] {
  return Array.isArray(value) ? value : [];
}

function text(value: unknown): string {
  return typeof value === "string" ? value : "";
}

function conversationOf(value: unknown): Conversation {
  const { id, title, updated, settings, lanes } = fields(value);
  const read = list(lanes).slice(0, 2).map((lane) => ({ model: text(fields(lane).model), turns: list(fields(lane).turns).map(turnOf) }));
  if (read.length === 0 || read.some((lane) => !lane.model)) throw new Error("It is not an exported conversation.");
  const names = Object.keys(NO_SETTINGS) as (keyof Settings)[];
  return {
    id: /^[\w-]{1,64}$/.test(text(id)) ? text(id) : identifier(),
    title: text(title) || "Imported",
    updated: Number(updated) || Date.now(),
    settings: Object.fromEntries(names.map((name) => [name, text(fields(settings)[name])])) as unknown as Settings,
    lanes: read,
  };
}

function turnOf(value: unknown): Turn {
  const turn = fields(value);
  const own = { text: text(turn.text), id: text(turn.id), name: text(turn.name) };
  switch (turn.role) {
    case "user":
      return { role: "user", text: own.text, images: list(turn.images).map(text).filter((url) => PICTURE.test(url)) };
    case "tool":
      return { role: "tool", ...own };
    case "assistant": {
      const calls = list(turn.calls).map(fields).map((call) => ({ id: text(call.id), name: text(call.name), arguments: text(call.arguments) }));
      const known = fields(fields(turn.metrics).usage).completion_tokens !== undefined;
      const metrics = known ? (turn.metrics as Metrics) : null;
      return { role: "assistant", text: own.text, thinking: text(turn.thinking), calls, metrics, finish: text(turn.finish), error: text(turn.error) || null };
    }
    default:
      throw new Error("It is not an exported conversation.");
  }
}

const NAME = "headrace";
const TABLE = "conversations";
let opened: Promise<IDBDatabase> | null = null;

function database(): Promise<IDBDatabase> {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

async function run<T>(mode: IDBTransactionMode, work: (table: IDBObjectStore) => IDBRequest<T>): Promise<T> {
  const table = (await database()).transaction(TABLE, mode).objectStore(TABLE);
  return new Promise((resolve, reject) => {
    const request = work(table);
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** All kept conversations, newest first; none where the browser keeps nothing. */
export async function load(): Promise<Conversation[]> {
  try {
    const all = await run<Conversation[]>("readonly", (table) => table.getAll());
    return all.sort((a, b) => b.updated - a.updated);
  } catch {
    return [];
  }
}

export async function save(conversation: Conversation): Promise<void> {
  await run("readwrite", (table) => table.put(conversation)).catch(() => undefined);
}

export async function remove(id: string): Promise<void> {
  await run("readwrite", (table) => table.delete(id)).catch(() => undefined);
}
