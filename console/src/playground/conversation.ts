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
