import { Store } from "../store";

/** The id of the conversation that is shown; null is a new one. */
export const opened = new Store<string | null>(null);
