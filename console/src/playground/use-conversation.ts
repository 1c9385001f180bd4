/** The conversations of this browser, and the answers that are being written. */

import { useEffect, useRef, useState } from "preact/hooks";

import { messageOf } from "../api";
import { useStore } from "../store";
import { type AnswerTurn, type Conversation, fresh, isEmpty, load, remove, save, type Turn } from "./conversation";
import { opened } from "./opened";
import { bodyOf, emptyAnswer, stream } from "./request";

export interface Control {
  all: Conversation[];
  current: Conversation;
  /** The stage of each lane whose answer is being written: "" once it has begun. */
  writing: (string | null)[];
  problem: string | null;
  change: (change: (conversation: Conversation) => void) => void;
  send: (text: string, images: string[]) => void;
  answerCalls: (lane: number, results: string[]) => void;
  again: (lane: number) => void;
  stop: () => void;
  create: () => void;
  open: (id: string) => void;
  drop: (id: string) => void;
}

export function useConversations(firstModel: string): Control {
  const id = useStore(opened);
  const [all, setAll] = useState<Conversation[]>([]);
  const [draft, setDraft] = useState(() => fresh([firstModel]));
  const [writing, setWriting] = useState<(string | null)[]>([]);
  const [problem, setProblem] = useState<string | null>(null);
  const calls = useRef(new Set<AbortController>());
  const latest = useRef<Conversation>(draft);
  const current = all.find((conversation) => conversation.id === id) ?? draft;
  latest.current = current;

  useEffect(() => {
    // Those that were changed while the others were read are newer than what was read.
    void load().then((read) => setAll((last) => [...last, ...read.filter((one) => !last.some((other) => other.id === one.id))]));
  }, []);
  useEffect(() => () => stop(), []);

  const stop = () => {
    for (const call of calls.current) call.abort();
  };

  /** Put a changed conversation in the place of the one that is shown. */
  const replace = (next: Conversation, keep: boolean) => {
    latest.current = next;
    if (all.some((other) => other.id === next.id)) {
      setAll((last) => last.map((other) => (other.id === next.id ? next : other)));
    } else if (isEmpty(next)) {
      setDraft(next);
    } else {
      setAll((last) => [next, ...last.filter((other) => other.id !== next.id)]);
      setDraft(fresh(next.lanes.map((lane) => lane.model), next.settings));
      opened.set(next.id);
    }
    if (keep && !isEmpty(next)) void save(next);
  };

  const change = (edit: (conversation: Conversation) => void) => {
    const next = structuredClone(latest.current);
    edit(next);
    replace(next, true);
  };

  const write = async (conversation: Conversation, place: number) => {
    const lane = conversation.lanes[place]!;
    const call = new AbortController();
    calls.current.add(call);
    const show = (answer: AnswerTurn, stage: string, done = false) => {
      const shown = latest.current;
      if (shown.id !== conversation.id) return;
      const lanes = shown.lanes.map((other, index) => (index === place ? { ...other, turns: [...lane.turns, answer] } : other));
      const next = { ...shown, lanes, updated: Date.now() };
      latest.current = next;
      setAll((last) => last.map((other) => (other.id === next.id ? next : other)));
      setWriting((last) => with_(last, place, done ? null : stage));
      if (done) void save(next);
    };
    show(emptyAnswer(), "sending");
    try {
      const answer = await stream(bodyOf(lane, conversation.settings), call.signal, perFrame(show));
      show({ ...answer, calls: [...answer.calls] }, "", true);
    } catch (error) {
      show({ ...emptyAnswer(), error: messageOf(error) }, "", true);
    }
    calls.current.delete(call);
  };

  const ask = (edit: (conversation: Conversation) => void, lanes: number[]) => {
    const next = structuredClone(latest.current);
    edit(next);
    next.updated = Date.now();
    next.title ||= titleOf(next);
    try {
      for (const place of lanes) bodyOf(next.lanes[place]!, next.settings);
    } catch (error) {
      setProblem(messageOf(error));
      return;
    }
    setProblem(null);
    replace(next, true);
    for (const place of lanes) void write(next, place);
  };

  const push = (conversation: Conversation, place: number, ...turns: Turn[]) => conversation.lanes[place]!.turns.push(...turns);
  const everyLane = (conversation: Conversation) => conversation.lanes.map((_, index) => index);

  return {
    all,
    current,
    writing,
    problem,
    change,
    stop,
    send: (text, images) =>
      ask(
        (next) => everyLane(next).forEach((place) => push(next, place, { role: "user", text, images })),
        everyLane(latest.current),
      ),
    answerCalls: (place, results) =>
      ask((next) => {
        const last = next.lanes[place]!.turns.at(-1) as AnswerTurn;
        push(next, place, ...last.calls.map((call, index): Turn => ({ role: "tool", id: call.id, name: call.name, text: results[index] ?? "" })));
      }, [place]),
    again: (place) =>
      ask((next) => {
        if (next.lanes[place]!.turns.at(-1)?.role === "assistant") next.lanes[place]!.turns.pop();
      }, [place]),
    create: () => {
      stop();
      setProblem(null);
      setDraft(fresh(current.lanes.map((lane) => lane.model), current.settings));
      opened.set(null);
    },
    open: (other) => {
      stop();
      setProblem(null);
      opened.set(other);
    },
    drop: (other) => {
      stop();
      void remove(other);
      setAll((last) => last.filter((conversation) => conversation.id !== other));
      if (opened.get() === other) opened.set(null);
    },
  };
}

function with_<T>(items: T[], place: number, value: T): T[] {
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
