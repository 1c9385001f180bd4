/** The page that is shown, from the fragment of the address: `#/requests/abc`. */

import { Store } from "./store";

function read(): string[] {
  return location.hash
    .replace(/^#\/?/, "")
    .split("/")
    .filter(Boolean)
    .map((part) => {
      try {
        return decodeURIComponent(part);
      } catch {
        return part;
      }
    });
}

export const route = new Store<string[]>(read());
window.addEventListener("hashchange", () => route.set(read()));

export function link(...parts: string[]): string {
  return `#/${parts.map(encodeURIComponent).join("/")}`;
}

export function go(...parts: string[]): void {
  location.hash = link(...parts);
}
