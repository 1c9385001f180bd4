/** Values that components follow. */

import { useEffect, useState } from "preact/hooks";

export class Store<T> {
  #value: T;
  #listeners = new Set<() => void>();

  constructor(value: T) {
    this.#value = value;
  }

  get(): T {
    return this.#value;
  }

  set(value: T): void {
    if (Object.is(value, this.#value)) return;
    this.#value = value;
    for (const listener of [...this.#listeners]) listener();
  }

  subscribe(listener: () => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }
}

/** The value of a store; the component is rendered again when it changes. */
export function useStore<T>(store: Store<T>): T {
  const [, render] = useState(0);
  useEffect(() => {
    const update = () => render((count) => count + 1);
    update();
    return store.subscribe(update);
  }, [store]);
  return store.get();
}

/** A value that is kept as JSON: in this browser, or in this tab until it is closed. */
export function kept<T>(name: string, initial: T, where: "localStorage" | "sessionStorage" = "localStorage"): Store<T> {
  const place = `headrace.${name}`;
  let value = initial;
  try {
    const text = window[where].getItem(place);
    if (text !== null) value = JSON.parse(text);
  } catch {
    // Damaged or forbidden: the initial value it is.
  }
  const store = new Store(value);
  store.subscribe(() => {
    try {
      if (store.get() === initial) window[where].removeItem(place);
      else window[where].setItem(place, JSON.stringify(store.get()));
    } catch {
      // A full or forbidden storage: the value lasts as long as the page.
    }
  });
  return store;
}
