/** The conversations of this browser, and the answers that are being written. */

import { useEffect } from "preact/hooks";

import { messageOf } from "../api";
import { session } from "../session";
import { kept, Store, useStore } from "../store";
import { type AnswerTurn, type Conversation, fresh, imported, isEmpty, load, remove, save, type Turn } from "./conversation";
import { opened } from "./opened";
import { bodyOf, emptyAnswer, stream } from "./request";

/** A message that is not sent yet. */
export interface Draft {
  text: string;
  images: string[];
  /** The number of the user's message that it replaces, with all after it; null is a new message. */
  replaces: number | null;
}

export const NO_DRAFT: Draft = { text: "", images: [], replaces: null };
/** Kept in this tab: leaving the page, or a revoked key, loses nothing. */
export const draft = kept<Draft>("draft", NO_DRAFT, "sessionStorage");

export interface Control {
  all: Conversation[];
  current: Conversation;
  /** The stage of each lane whose answer is being written: "" once it has begun. */
  writing: (string | null)[];
  problem: string | null;
}

const conversations = new Store<Conversation[]>([]);
/** The new conversation, which is in no list yet. */
const blank = new Store<Conversation>(fresh([]));
const writing = new Store<(string | null)[]>([]);
const problem = new Store<string | null>(null);
const calls = new Set<AbortController>();

// Answers go on while other pages are shown, but not without the key.
session.subscribe(() => session.get().phase === "locked" && stop());

/** Follow the conversations; a new one is with this model. */
export function useConversations(firstModel: string): Control {
  const id = useStore(opened);
  const all = useStore(conversations);
  if (blank.get().lanes.length === 0) blank.set(fresh([firstModel]));
  const empty = useStore(blank);
  useEffect(() => {
    // Those that were changed while the others were read are newer than what was read.
    void load().then((read) => {
      const last = conversations.get();
      const added = read.filter((one) => !last.some((other) => other.id === one.id));
      conversations.set([...last, ...added].sort((a, b) => b.updated - a.updated));
    });
  }, []);
  return {
    all,
    current: all.find((conversation) => conversation.id === id) ?? empty,
    writing: useStore(writing),
    problem: useStore(problem),
  };
}

function shown(): Conversation {
  return conversations.get().find((conversation) => conversation.id === opened.get()) ?? blank.get();
}

export function stop(): void {
  for (const call of calls) call.abort();
}

/** Put a changed conversation in the place of the one that is shown, and keep it. */
function replace(next: Conversation): void {
  const all = conversations.get();
  if (all.some((other) => other.id === next.id)) {
    conversations.set(all.map((other) => (other.id === next.id ? next : other)));
  } else if (isEmpty(next)) {
    blank.set(next);
  } else {
    conversations.set([next, ...all]);
    blank.set(fresh(next.lanes.map((lane) => lane.model), next.settings));
    opened.set(next.id);
  }
  if (!isEmpty(next)) void save(next);
}

export function change(edit: (conversation: Conversation) => void): void {
  const next = structuredClone(shown());
  edit(next);
  replace(next);
}

async function write(conversation: Conversation, place: number): Promise<void> {
  const lane = conversation.lanes[place]!;
  const call = new AbortController();
  calls.add(call);
  const show = (answer: AnswerTurn, stage: string, done = false) => {
    const last = conversations.get().find((other) => other.id === conversation.id);
    if (!last) return; // It was deleted.
    const lanes = last.lanes.map((other, index) => (index === place ? { ...other, turns: [...lane.turns, answer] } : other));
    const next = { ...last, lanes, updated: Date.now() };
    conversations.set(conversations.get().map((other) => (other.id === next.id ? next : other)));
    if (shown().id === next.id) writing.set(withValue(writing.get(), place, done ? null : stage));
    if (done) void save(next);
  };
  show(emptyAnswer(), "sending");
  try {
    const answer = await stream(bodyOf(lane, conversation.settings), call.signal, perFrame(show));
    show({ ...answer, calls: [...answer.calls] }, "", true);
  } catch (error) {
    show({ ...emptyAnswer(), error: messageOf(error) }, "", true);
  }
  calls.delete(call);
}

/** Change the conversation that is shown, and let these lanes answer. */
function ask(edit: (conversation: Conversation) => void, lanes: number[]): boolean {
  const next = structuredClone(shown());
  edit(next);
  next.updated = Date.now();
  next.title ||= titleOf(next);
  try {
    for (const place of lanes) bodyOf(next.lanes[place]!, next.settings);
  } catch (error) {
    problem.set(messageOf(error));
    return false;
  }
  problem.set(null);
  replace(next);
  for (const place of lanes) void write(next, place);
  return true;
}

/** Send a message to all lanes; false if the settings cannot be read. */
export function send({ text, images, replaces }: Draft): boolean {
  const edit = (next: Conversation) => {
    for (const lane of next.lanes) {
      if (replaces !== null) lane.turns = lane.turns.slice(0, placeOf(lane.turns, replaces));
      lane.turns.push({ role: "user", text, images });
    }
    if (replaces === 0) next.title = "";
  };
  return ask(edit, shown().lanes.map((_, index) => index));
}

/** Take an earlier message of the user into the composer. */
export function rewrite(turns: Turn[], index: number): void {
  const turn = turns[index];
  if (turn?.role !== "user") return;
  const replaces = turns.slice(0, index).filter((other) => other.role === "user").length;
  draft.set({ text: turn.text, images: turn.images, replaces });
}

/** The place of the user's message with this number; the end if there are fewer. */
function placeOf(turns: Turn[], number: number): number {
  const places = [...turns.keys()].filter((index) => turns[index]!.role === "user");
  return places[number] ?? turns.length;
}

export function answerCalls(place: number, results: string[]): void {
  ask((next) => {
    const { turns } = next.lanes[place]!;
    const last = turns.at(-1) as AnswerTurn;
    turns.push(...last.calls.map((call, index): Turn => ({ role: "tool", id: call.id, name: call.name, text: results[index] ?? "" })));
  }, [place]);
}

export function again(place: number): void {
  ask((next) => {
    const { turns } = next.lanes[place]!;
    if (turns.at(-1)?.role === "assistant") turns.pop();
  }, [place]);
}

/** Show another conversation, or a new one with the same models and settings. */
export function open(id: string | null): void {
  stop();
  problem.set(null);
  writing.set([]);
  draft.set(draft.get().replaces === null ? draft.get() : NO_DRAFT);
  const { lanes, settings } = shown();
  if (id === null) blank.set(fresh(lanes.map((lane) => lane.model), settings));
  opened.set(id);
}

export function drop(id: string): void {
  if (opened.get() === id) open(null);
  void remove(id);
  conversations.set(conversations.get().filter((conversation) => conversation.id !== id));
}

/** Add conversations from a file; those that are here already are replaced. */
export async function add(file: File): Promise<void> {
  try {
    const read = await imported(file);
    for (const conversation of read) await save(conversation);
    const others = conversations.get().filter((other) => !read.some(({ id }) => id === other.id));
    conversations.set([...read, ...others].sort((a, b) => b.updated - a.updated));
    open(read[0]?.id ?? null);
  } catch (error) {
    problem.set(`${file.name}: ${messageOf(error)}`);
  }
}

function withValue<T>(items: T[], place: number, value: T): T[] {
  const next = [...items];
  next[place] = value;
  return next;
}

function titleOf(conversation: Conversation): string {
  const first = conversation.lanes[0]?.turns.find((turn) => turn.role === "user");
  return first?.text.trim().replace(/\s+/g, " ").slice(0, 60) || "Picture";
}

/** Call a function at most once for each frame of the screen, with a copy of the last answer. */
function perFrame(show: (answer: AnswerTurn, stage: string) => void) {
  let next: [AnswerTurn, string] | null = null;
  return (answer: AnswerTurn, stage: string) => {
    if (next === null) {
      const flush = () => {
        const [last, state] = next!;
        next = null;
        if (!last.finish && !last.error) show({ ...last, calls: last.calls.map((call) => ({ ...call })) }, state);
      };
      // A hidden tab has no frames.
      if (document.hidden) setTimeout(flush, 250);
      else requestAnimationFrame(flush);
    }
    next = [answer, stage];
  };
}
