/** Small parts that all pages use. */

import type { ComponentChildren, JSX } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";

import { bytes } from "./format";

const ICONS = {
  now: "M3 12h4l3-8 4 16 3-8h4",
  chat: "M4 5h16v11H9l-5 4z",
  requests: "M4 6h16M4 12h10M4 18h13",
  usage: "M5 20V10M12 20V4M19 20v-7",
  speed: "M4 18a8 8 0 1116 0M12 18l4-6M4 18h2M18 18h2",
  models: "M12 3l8 4.5v9L12 21l-8-4.5v-9zM4 7.5l8 4.5 8-4.5M12 12v9",
  docs: "M6 3h9l4 4v14H6zM9 12h7M9 16h7",
  sun: "M12 8a4 4 0 100 8 4 4 0 000-8zM12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.4 1.4M17.6 17.6L19 19M5 19l1.4-1.4M17.6 6.4L19 5",
  moon: "M20 14.5A8 8 0 119.5 4a6.5 6.5 0 0010.5 10.5z",
  auto: "M12 3a9 9 0 100 18 9 9 0 000-18zM12 3v18",
  key: "M14.5 9.5a4.5 4.5 0 10-4 4.5l1.5-1.5H14V10zM14 12.5l6 6v2h-3v-2h-2v-2",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  check: "M4 12l5 5L20 6",
  plus: "M12 5v14M5 12h14",
  trash: "M4 7h16M9 7V4h6v3M6 7l1 13h10l1-13",
  stop: "M7 7h10v10H7z",
  send: "M12 19V5M6 11l6-6 6 6",
  image: "M4 5h16v14H4zM4 16l5-5 4 4 2-2 5 5M15 9h.01",
  again: "M20 11a8 8 0 10-2.3 5.7M20 5v6h-6",
  save: "M12 4v11M7 11l5 5 5-5M4 20h16",
  load: "M12 15V4M7 8l5-5 5 5M4 20h16",
  edit: "M4 20l1-4L16 5l3 3L8 19zM14 7l3 3",
  close: "M6 6l12 12M18 6L6 18",
  pin: "M9 4h6l-1 6 3 3v2H7v-2l3-3zM12 15v6",
  list: "M4 6h16M4 12h16M4 18h16",
  tune: "M4 7h9M17 7h3M4 17h3M11 17h9M15 5v4M9 15v4",
  columns: "M4 5h16v14H4zM12 5v14",
  next: "M9 5l7 7-7 7",
  search: "M11 4a7 7 0 100 14 7 7 0 000-14zM16 16l4.5 4.5",
};

export type IconName = keyof typeof ICONS;

export function Icon({ name }: { name: IconName }) {
  return (
    <svg class="icon" viewBox="0 0 24 24" aria-hidden="true">
      <path d={ICONS[name]} />
    </svg>
  );
}

interface ButtonProps extends Omit<JSX.IntrinsicElements["button"], "icon" | "ref"> {
  icon?: IconName;
  kind?: "plain" | "primary" | "quiet" | "danger";
  /** Only the icon is shown; the text is for screen readers and the tooltip. */
  bare?: boolean;
  label: string;
}

export function Button({ icon, kind = "plain", bare, label, class: more, ...rest }: ButtonProps) {
  const name = `button ${kind}${bare ? " bare" : ""} ${more ?? ""}`;
  return (
    <button type="button" class={name} {...(bare ? { title: label, "aria-label": label } : {})} {...rest}>
      {icon && <Icon name={icon} />}
      {!bare && <span>{label}</span>}
    </button>
  );
}

const TONES: Record<string, string> = {
  ready: "good",
  ok: "good",
  loading: "busy",
  unloading: "busy",
  downloading: "busy",
  queued: "busy",
  prefill: "busy",
  decode: "busy",
  fits: "good",
  failed: "bad",
  error: "bad",
  refused: "warn",
  cancelled: "idle",
  disabled: "idle",
};

/** A state as a word with a coloured dot. */
export function Badge({ state }: { state: string }) {
  return <span class={`badge ${TONES[state] ?? "idle"}`}>{state}</span>;
}

export function Empty({ title, children }: { title: string; children?: ComponentChildren }) {
  return (
    <div class="empty">
      <p class="title">{title}</p>
      {children && <p>{children}</p>}
    </div>
  );
}

export function Problem({ text, again }: { text: string; again?: () => void }) {
  return (
    <div class="problem" role="alert">
      <p>{text}</p>
      {again && <Button label="Try again" icon="again" onClick={again} />}
    </div>
  );
}

export function Loading() {
  return (
    <p class="loading" role="status">
      Loading …
    </p>
  );
}

export function PageHead({ title, note, children }: { title: string; note?: ComponentChildren; children?: ComponentChildren }) {
  return (
    <header class="page-head">
      <h1>{title}</h1>
      {note && <p class="note">{note}</p>}
      {children && <div class="tools">{children}</div>}
    </header>
  );
}

/** Content that is made when it is opened: a page of it all would be slow. */
export function Folded({ title, children }: { title: string; children: ComponentChildren }) {
  const [open, setOpen] = useState(false);
  return (
    <details onToggle={(event) => setOpen(event.currentTarget.open)}>
      <summary>{title}</summary>
      {open && children}
    </details>
  );
}

/** A text with a button that copies it. */
export function CopyButton({ text, label = "Copy", bare = false }: { text: () => string; label?: string; bare?: boolean }) {
  const [done, setDone] = useState(false);
  useEffect(() => {
    if (!done) return;
    const timer = setTimeout(() => setDone(false), 1500);
    return () => clearTimeout(timer);
  }, [done]);
  const copy = () => void writeClipboard(text()).then(() => setDone(true));
  return <Button kind="quiet" bare={bare} icon={done ? "check" : "copy"} label={done ? "Copied" : label} onClick={copy} />;
}

async function writeClipboard(text: string): Promise<void> {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  // Pages over plain HTTP from another machine have no clipboard object.
  const area = document.createElement("textarea");
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

/** A dialog over the page; Escape and a click outside close it. */
export function Dialog({ title, close, children }: { title: string; close: () => void; children: ComponentChildren }) {
  const place = useRef<HTMLDialogElement>(null);
  // Not a layout effect: that ends before the dialog does, and what is behind a dialog takes no focus.
  useEffect(() => {
    const before = document.activeElement;
    place.current?.showModal();
    return () => before instanceof HTMLElement && before.focus();
  }, []);
  const outside = (event: MouseEvent) => event.target === place.current && close();
  return (
    <dialog ref={place} aria-label={title} onClose={close} onClick={outside}>
      <div class="dialog">
        <header>
          <h2>{title}</h2>
          <Button kind="quiet" icon="close" bare label="Close" onClick={close} />
        </header>
        {children}
      </div>
    </dialog>
  );
}

export interface Part {
  name: string;
  value: number;
  tone: string;
}

/** A bar of parts of a whole, with a mark for a limit. */
export function Bar({ parts, whole, mark, label }: { parts: Part[]; whole: number; mark?: number; label: string }) {
  let start = 0;
  const percent = (value: number) => (whole > 0 ? Math.min(100, (100 * value) / whole) : 0);
  return (
    <svg class="bar" viewBox="0 0 100 8" preserveAspectRatio="none" role="img" aria-label={label}>
      <rect class="ground" width="100" height="8" />
      {parts.map((part) => {
        const place = start;
        start += percent(part.value);
        return (
          <rect key={part.name} class={`part ${part.tone}`} x={place} width={Math.max(0, Math.min(percent(part.value), 100 - place))} height="8">
            <title>{part.name}</title>
          </rect>
        );
      })}
      {mark !== undefined && mark < whole && (
        <rect class="mark" x={percent(mark)} width="0.5" height="8">
          <title>the most that models may use</title>
        </rect>
      )}
    </svg>
  );
}

/** Name and value of each fact that is known. */
export function Facts({ facts }: { facts: [string, ComponentChildren][] }) {
  const known = facts.filter(([, value]) => value !== null && value !== undefined && value !== "" && value !== "–");
  return (
    <dl class="facts">
      {known.map(([name, value]) => (
        <div key={name}>
          <dt>{name}</dt>
          <dd>{value}</dd>
        </div>
      ))}
    </dl>
  );
}

export function memoryText(memory: Record<string, number>): string {
  return Object.entries(memory)
    .map(([device, size]) => (Object.keys(memory).length > 1 ? `${device} ${bytes(size)}` : bytes(size)))
    .join(", ");
}

export function Field({ label, hint, children }: { label: string; hint?: string; children: ComponentChildren }) {
  return (
    <label class="field">
      <span class="name">{label}</span>
      {children}
      {hint && <span class="hint">{hint}</span>}
    </label>
  );
}

export function download(name: string, text: string, type = "application/json"): void {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
