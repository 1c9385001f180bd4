/** System prompt, sampling and tools of a conversation. */

import { Field } from "../ui";
import type { Settings } from "./conversation";

const TOOLS_HINT = 'A JSON array, as [{"type": "function", "function": {"name": …, "parameters": …}}]';

export function SettingsPanel({ settings, change }: { settings: Settings; change: (part: Partial<Settings>) => void }) {
  const number = (name: "temperature" | "top_p" | "max_tokens" | "seed", label: string, step: string, max?: string) => (
    <Field label={label}>
      <input
        type="number"
        min="0"
        step={step}
        placeholder="default"
        {...(max ? { max } : {})}
        value={settings[name]}
        onInput={(event) => change({ [name]: event.currentTarget.value })}
      />
    </Field>
  );
  const text = (name: "system" | "stop" | "tools" | "extra", label: string, rows: number, hint = "") => (
    <Field label={label} hint={hint}>
      <textarea
        rows={rows}
        class={name === "system" ? "" : "mono"}
        spellcheck={name === "system"}
        value={settings[name]}
        onInput={(event) => change({ [name]: event.currentTarget.value })}
      />
    </Field>
  );
  return (
    <aside class="settings" aria-label="Settings of the conversation">
      {text("system", "System prompt", 4)}
      <div class="two-fields">
        {number("temperature", "Temperature", "0.1", "2")}
        {number("top_p", "Top p", "0.05", "1")}
        {number("max_tokens", "Max tokens", "1")}
        {number("seed", "Seed", "1")}
      </div>
      {text("stop", "Stop strings", 2, "One on each line")}
      {text("tools", "Tools", 5, TOOLS_HINT)}
      {text("extra", "Further fields of the request", 2, 'A JSON object, as {"top_k": 40}')}
    </aside>
  );
}
