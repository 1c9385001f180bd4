/** Whether a key is needed, and which models there are. */

import { ApiError, currentKey, getJson, messageOf, setKey, whenRefused } from "./api";
import { reset } from "./overview";
import { Store } from "./store";
import type { ModelCard } from "./types";

export interface Session {
  /** `checking` until the service has answered; `locked` while a key is needed. */
  phase: "checking" | "locked" | "open" | "unreachable";
  models: ModelCard[];
  problem: string | null;
}

export const session = new Store<Session>({ phase: "checking", models: [], problem: null });

/** Ask for the models, which also shows whether the key is right. */
export async function check(): Promise<void> {
  try {
    const { data } = await getJson<{ data: ModelCard[] }>("/v1/models");
    session.set({ phase: "open", models: data, problem: null });
  } catch (error) {
    const status = error instanceof ApiError ? error.status : 0;
    if (status === 401) return; // `lock` was called.
    if (status === 403) lock(error as ApiError);
    // A page that is open stays so, with what is written in it, and shows what it could not reach.
    else if (session.get().phase !== "open") session.set({ phase: "unreachable", models: [], problem: messageOf(error) });
  }
}

/** Ask for a key: there is none, or it is wrong, or was revoked while the page was open. */
function lock(error: ApiError): void {
  const had = currentKey() !== null;
  if (!had && session.get().phase === "locked") return;
  setKey(null);
  session.set({ phase: "locked", models: [], problem: had ? error.message : null });
}

whenRefused(lock);

/** Use a key from now on; null asks for one again. */
export async function enter(key: string | null): Promise<void> {
  if (key !== null && !/^[\x21-\x7e]+$/.test(key)) {
    const problem = "A key has no spaces, and no characters beyond ASCII.";
    session.set({ phase: "locked", models: [], problem });
    return;
  }
  setKey(key);
  reset();
  await check();
}
