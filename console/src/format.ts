/** Numbers and times as people read them. */

import type { Usage } from "./types";

export function bytes(value: number): string {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  let amount = value;
  while (amount >= 999.5 && unit < units.length - 1) {
    amount /= 1000;
    unit += 1;
  }
  return `${unit === 0 || amount >= 100 ? amount.toFixed(0) : amount.toFixed(1)} ${units[unit]}`;
}

/** A duration: `8.2 ms`, `640 ms`, `1.53 s`, `2 min 5 s`. */
export function ms(value: number | null | undefined): string {
  if (value == null) return "–";
  if (value === 0) return "0 ms";
  if (value < 99.5) return `${value < 10 ? value.toFixed(1) : value.toFixed(0)} ms`;
  if (value < 999.5) return `${value.toFixed(0)} ms`;
  const seconds = value / 1000;
  if (seconds < 99.5) return `${seconds < 10 ? seconds.toFixed(2) : seconds.toFixed(1)} s`;
  return span(seconds);
}

/** A longer time: `45 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`. */
export function span(seconds: number): string {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return join(Math.floor(whole / 60), "min", whole % 60, "s");
  if (whole < 86400) return join(Math.floor(whole / 3600), "h", Math.floor((whole % 3600) / 60), "min");
  return join(Math.floor(whole / 86400), "d", Math.floor((whole % 86400) / 3600), "h");
}

function join(large: number, unit: string, small: number, rest: string): string {
  return small === 0 ? `${large} ${unit}` : `${large} ${unit} ${small} ${rest}`;
}

export function rate(value: number | null | undefined): string {
  if (value == null) return "–";
  return value >= 99.5 ? whole.format(Math.round(value)) : value.toFixed(1);
}

const whole = new Intl.NumberFormat("en");
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

export function count(value: number): string {
  return whole.format(value);
}

/** What came of the tokens that speculation drafted. */
export function draftText({ drafted_tokens, accepted_tokens }: Usage): string {
  return `${count(accepted_tokens)} of ${count(drafted_tokens)} drafted tokens accepted`;
}

/** A large number in short: `12.4K`, `3.1M`. */
export function compact(value: number): string {
  return value < 10_000 ? whole.format(value) : short.format(value);
}

const clockFormat = new Intl.DateTimeFormat("en-GB", {
  hour: "2-digit",
  minute: "2-digit",
  second: "2-digit",
});
const dayFormat = new Intl.DateTimeFormat("en-GB", { day: "2-digit", month: "short" });

/** The time of a Unix time, with the day unless it is today. */
export function moment(unix: number): string {
  const date = new Date(unix * 1000);
  const today = date.toDateString() === new Date().toDateString();
  return today ? clockFormat.format(date) : `${dayFormat.format(date)} ${clockFormat.format(date)}`;
}

export function iso(unix: number): string {
  return new Date(unix * 1000).toISOString().replace("T", " ").replace("Z", " UTC");
}
