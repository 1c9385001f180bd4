/** The state of the service, polled while a page shows it and the tab is visible. */

import { useEffect } from "preact/hooks";

import { ApiError, getJson, isAbort, messageOf, send } from "./api";
import { Store, useStore } from "./store";
import type { Overview, Sample } from "./types";

const EVERY_MS = 2000;
const SLOWEST_MS = 15_000;
const SAMPLES = 600;

export interface State {
  overview: Overview | null;
  samples: Sample[];
  problem: string | null;
  /** Whether the key may not read it. */
  forbidden: boolean;
  /** The time of the service, Unix seconds: this machine's clock may differ. */
  now: number;
}

export const state = new Store<State>({
  overview: null,
  samples: [],
  problem: null,
  forbidden: false,
  now: Date.now() / 1000,
});

let users = 0;
let timer: ReturnType<typeof setTimeout> | undefined;
let running: AbortController | null = null;
let tag: string | null = null;
let pause = EVERY_MS;
let newest = 0;

/** Follow the state of the service while the component is there. */
export function useOverview(): State {
  useEffect(() => {
    users += 1;
    if (users === 1) start();
    return () => {
      users -= 1;
      if (users === 0) stop();
    };
  }, []);
  return useStore(state);
}

/** Ask again now, after something was changed. */
export function refresh(): void {
  if (users > 0 && !document.hidden) start();
}

/** Forget everything, as with another key other things can be seen. */
export function reset(): void {
  tag = null;
  newest = 0;
  state.set({ ...state.get(), overview: null, samples: [], problem: null, forbidden: false });
  refresh();
}

function start(): void {
  stop();
  pause = EVERY_MS;
  if (!document.hidden) void poll();
}

function stop(): void {
  clearTimeout(timer);
  running?.abort();
  running = null;
}

async function poll(): Promise<void> {
  const call = (running = new AbortController());
  try {
    // After a pause there is a gap, which the service has samples of.
    if (Date.now() / 1000 - newest > 15) await fill(call.signal);
    await read(call.signal);
    pause = EVERY_MS;
  } catch (error) {
    if (isAbort(error)) return;
    const forbidden = error instanceof ApiError && error.status === 403;
    state.set({ ...state.get(), problem: messageOf(error), forbidden });
    // Another key may read it, and begins anew.
    if (forbidden) return;
    pause = Math.min(pause * 2, SLOWEST_MS);
  }
  if (running === call) timer = setTimeout(() => void poll(), pause);
}

async function fill(signal: AbortSignal): Promise<void> {
  const history = await getJson<{ samples: Sample[] }>("/admin/history", signal);
  state.set({ ...state.get(), samples: history.samples });
}

async function read(signal: AbortSignal): Promise<void> {
  const headers: Record<string, string> = tag ? { "if-none-match": tag } : {};
  const response = await send("/admin/overview", { signal, headers });
  const last = state.get();
  const overview: Overview =
    response.status === 304 && last.overview ? last.overview : await response.json();
  tag = response.headers.get("etag") ?? tag;
  newest = Date.now() / 1000;
  const served = Date.parse(response.headers.get("date") ?? "") / 1000 || newest;
  const now = Math.max(served, (last.samples.at(-1)?.time ?? 0) + 0.1);
  const samples = [...last.samples, sample(overview, now)].slice(-SAMPLES);
  state.set({ overview, samples, problem: null, forbidden: false, now });
}

function sample(overview: Overview, time: number): Sample {
  const { rates, models, devices } = overview;
  const first = rates.map((r) => r.time_to_first_token_p50_ms ?? 0);
  return {
    time,
    running: overview.running_count,
    queued: models.reduce((sum, model) => sum + model.queued, 0),
    prompt_tokens_per_second: rates.reduce((sum, r) => sum + r.prompt_tokens_per_second, 0),
    completion_tokens_per_second: rates.reduce((sum, r) => sum + r.completion_tokens_per_second, 0),
    time_to_first_token_p50_ms: Math.max(0, ...first) || null,
    memory: Object.fromEntries(devices.map((device) => [device.name, device.booked])),
  };
}

document.addEventListener("visibilitychange", () => {
  if (document.hidden) stop();
  else if (users > 0) start();
});
