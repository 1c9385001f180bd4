/** Light, dark, or as the system is set. */

import { kept } from "./store";

export type Theme = "auto" | "light" | "dark";

export const theme = kept<Theme>("theme", "auto");

function apply(): void {
  const value = theme.get();
  if (value === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = value;
}

theme.subscribe(apply);
apply();
