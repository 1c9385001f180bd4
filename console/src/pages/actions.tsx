/** What an operator can do with a model. */

import type { JSX } from "preact";
import { useState } from "preact/hooks";

import { messageOf, post } from "../api";
import { bytes } from "../format";
import { refresh } from "../overview";
import { check } from "../session";
import type { ModelStatus } from "../types";
import { Button } from "../ui";

export function stateOf(model: ModelStatus): string {
  if (!model.enabled) return "disabled";
  return named(model.state);
}

/** A state of the API as it is shown: a model that is served need not be loaded. */
export function named(state: string): string {
  return state === "created" || state === "stopped" ? "not loaded" : state;
}

export function Actions({ model, plan }: { model: ModelStatus; plan: () => void }) {
  const [busy, setBusy] = useState(false);
  const [problem, setProblem] = useState<string | null>(null);
  const act = async (path: string, more: object = {}) => {
    setBusy(true);
    setProblem(null);
    const done = post(`/admin/models/${path}`, { model: model.id, ...more });
    refresh();
    try {
      await done;
      void check();
    } catch (error) {
      setProblem(messageOf(error));
    }
    setBusy(false);
    refresh();
  };
  const loaded = model.state === "ready";
  const moving = busy || model.state === "loading" || model.state === "unloading";
  return (
    <div class="buttons">
      {loaded ? (
        <Button label="Unload" disabled={busy} aria-label={`Unload ${model.id}`} onClick={() => void act("unload")} />
      ) : (
        <Button label="Load" disabled={moving} aria-label={`Load ${model.id}`} onClick={() => void act("load")} />
      )}
      <Button
        icon="pin"
        bare
        kind={model.pinned ? "primary" : "plain"}
        label={model.pinned ? `Unpin ${model.id}` : `Pin ${model.id}, so that it is never evicted`}
        aria-pressed={model.pinned}
        disabled={busy}
        onClick={() => void act("pin", { pinned: !model.pinned })}
      />
      <Button icon="search" bare label={`What loading ${model.id} needs`} onClick={plan} />
      {problem && (
        <p class="sub bad" role="alert">
          {problem}
        </p>
      )}
    </div>
  );
}

/** Of many models those that are doing something, and a button for the rest; of few all, in their order. */
export function useFirst<T extends { state: string }>(models: T[], most: number): [T[], JSX.Element | null] {
  const [all, setAll] = useState(false);
  if (all || models.length <= most) return [models, null];
  const idle = (model: T) => named(model.state) === "not loaded";
  const active = models.filter((model) => !idle(model));
  const shown = [...active, ...models.filter(idle).slice(0, Math.max(0, most - active.length))];
  if (shown.length === models.length) return [models, null];
  return [shown, <Button class="more" label={`Show all ${models.length}`} onClick={() => setAll(true)} />];
}

/** The stage of a load, and how far it is. */
export function LoadProgress({ model }: { model: ModelStatus }) {
  if (!model.progress) return null;
  const known = model.total > 0;
  return (
    <span class="sub progress">
      <span>
        {model.progress}
        {known ? ` ${bytes(model.done)} of ${bytes(model.total)}` : " …"}
      </span>
      {known && <progress aria-label={`${model.progress} ${model.id}`} value={model.done} max={model.total} />}
    </span>
  );
}
