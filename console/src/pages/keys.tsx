/** The keys of the database: created, limited, revoked. A key is shown once. */

import { useEffect, useState } from "preact/hooks";

import { ApiError, currentKey, getJson, messageOf, post, send } from "../api";
import { count, moment } from "../format";
import { enter, session } from "../session";
import { useStore } from "../store";
import type { ApiKey, KeyLimits } from "../types";
import { Badge, Button, CopyButton, Dialog, Empty, Facts, Field, Loading, PageHead, Problem } from "../ui";
import { Limited } from "./now";

const LIMITS: [name: keyof KeyLimits, title: string][] = [
  ["requests_per_minute", "Requests per minute"],
  ["requests_per_day", "Requests per day"],
  ["tokens_per_minute", "Tokens per minute"],
  ["tokens_per_day", "Tokens per day"],
  ["concurrent", "Requests at a time"],
];

interface Wanted {
  name: string;
  scope: ApiKey["scope"];
  limits: KeyLimits;
  models: string[];
}

export function Keys() {
  const [keys, setKeys] = useState<ApiKey[] | null>(null);
  const [error, setError] = useState<unknown>(null);
  const [changed, setChanged] = useState<ApiKey | "new" | null>(null);
  const [revoked, setRevoked] = useState<ApiKey | null>(null);
  const [plain, setPlain] = useState<string | null>(null);
  const read = () =>
    getJson<{ data: ApiKey[] }>("/admin/keys").then(
      ({ data }) => (setKeys(data), setError(null)),
      (problem) => setError(problem),
    );
  useEffect(() => void read(), []);
  if (error instanceof ApiError && error.status === 403) return <Limited text={error.message} />;
  const save = async (wanted: Wanted) => {
    if (changed === "new") {
      const { key } = await post<{ key: string }>("/admin/keys", wanted);
      setPlain(key);
      // It was the first: from now on this tab needs it too.
      if (currentKey() === null) await enter(key);
    } else if (changed) {
      const { scope: _, ...change } = wanted;
      await post(`/admin/keys/${changed.id}`, change);
    }
    setChanged(null);
    await read();
  };
  const active = keys?.filter((key) => key.revoked === null) ?? [];
  const past = keys?.filter((key) => key.revoked !== null) ?? [];
  return (
    <>
      <PageHead title="Keys" note="Those of the database. Keys of the configuration are not listed, and have no limits.">
        <Button kind="primary" icon="plus" label="Create a key" onClick={() => setChanged("new")} />
      </PageHead>
      {error !== null && <Problem text={messageOf(error)} again={() => void read()} />}
      {!keys && error === null && <Loading />}
      {keys && active.length === 0 && (
        <Empty title="There are no keys">The first is an admin's. From then on, every request needs a key.</Empty>
      )}
      <ul class="cards key-list">
        {active.map((key) => (
          <li key={key.id} class="panel">
            <KeyView value={key} />
            <div class="buttons">
              <Button icon="tune" label="Change" aria-label={`Change ${key.name}`} onClick={() => setChanged(key)} />
              <Button kind="danger" icon="trash" label="Revoke" aria-label={`Revoke ${key.name}`} onClick={() => setRevoked(key)} />
            </div>
          </li>
        ))}
      </ul>
      {past.length > 0 && (
        <section>
          <h2>Revoked</h2>
          <ul class="cards">
            {past.map((key) => (
              <li key={key.id} class="panel">
                <KeyView value={key} />
              </li>
            ))}
          </ul>
        </section>
      )}
      {changed && <KeyForm value={changed === "new" ? null : changed} first={keys?.length === 0} save={save} close={() => setChanged(null)} />}
      {revoked && <Revoke value={revoked} close={() => (setRevoked(null), void read())} />}
      {plain && <Created text={plain} close={() => setPlain(null)} />}
    </>
  );
}

function KeyView({ value }: { value: ApiKey }) {
  const { used } = value;
  const parts: Record<keyof KeyLimits, number> = {
    requests_per_minute: used.minute_requests,
    requests_per_day: used.day_requests,
    tokens_per_minute: used.minute_tokens,
    tokens_per_day: used.day_tokens,
    concurrent: used.running,
  };
  return (
    <>
      <header>
        <h3>{value.name}</h3>
        {value.revoked !== null ? <Badge state="revoked" /> : <span class="note">{value.scope}</span>}
      </header>
      <Facts
        facts={[
          ["Id", value.id],
          ["Models", value.models.join(", ") || "all"],
          ...LIMITS.map(([name, title]): [string, string | null] => {
            const limit = value.limits[name];
            return [title, limit === undefined ? null : `${count(parts[name])} of ${count(limit)}`];
          }),
          ["Created", moment(value.created)],
          ["Last used", value.last_used === null ? "never" : moment(value.last_used)],
          ["Revoked", value.revoked === null ? null : moment(value.revoked)],
        ]}
      />
    </>
  );
}

interface KeyFormProps {
  value: ApiKey | null;
  first: boolean;
  save: (wanted: Wanted) => Promise<void>;
  close: () => void;
}

function KeyForm({ value, first, save, close }: KeyFormProps) {
  const { models: served } = useStore(session);
  const [name, setName] = useState(value?.name ?? "");
  const [scope, setScope] = useState<ApiKey["scope"]>(value?.scope ?? (first ? "admin" : "inference"));
  const [limits, setLimits] = useState<KeyLimits>(value?.limits ?? {});
  const [models, setModels] = useState<string[]>(value?.models ?? []);
  const [problem, setProblem] = useState<string | null>(null);
  const names = [...new Set([...served.map((model) => model.id), ...models])];
  const setLimit = (limit: keyof KeyLimits, text: string) => {
    const { [limit]: _, ...others } = limits;
    setLimits(text === "" ? others : { ...others, [limit]: Number(text) });
  };
  const toggle = (model: string) => setModels(models.includes(model) ? models.filter((other) => other !== model) : [...models, model]);
  const submit = (event: Event) => {
    event.preventDefault();
    save({ name: name.trim(), scope, limits, models }).catch((error) => setProblem(messageOf(error)));
  };
  return (
    <Dialog title={value ? `Change ${value.name}` : "Create a key"} close={close}>
      <form class="key-edit" onSubmit={submit}>
        <Field label="Name" hint="What it is for.">
          <input name="name" required maxLength={128} autocomplete="off" value={name} onInput={(event) => setName(event.currentTarget.value)} />
        </Field>
        {!value && (
          <Field label="Scope" hint="An admin also manages models and keys.">
            <select name="scope" value={scope} onChange={(event) => setScope(event.currentTarget.value as ApiKey["scope"])}>
              <option value="inference">inference</option>
              <option value="admin">admin</option>
            </select>
          </Field>
        )}
        {LIMITS.map(([limit, title]) => (
          <Field key={limit} label={title}>
            <input name={limit} type="number" min={1} step={1} placeholder="no limit" value={limits[limit] ?? ""} onInput={(event) => setLimit(limit, event.currentTarget.value)} />
          </Field>
        ))}
        <fieldset class="choices">
          <legend>Models; none chosen are all</legend>
          {names.map((model) => (
            <label key={model}>
              <input type="checkbox" checked={models.includes(model)} onChange={() => toggle(model)} /> {model}
            </label>
          ))}
        </fieldset>
        {problem && (
          <p class="error" role="alert">
            {problem}
          </p>
        )}
        <div class="buttons">
          <Button type="submit" kind="primary" label={value ? "Save" : "Create"} disabled={!name.trim()} />
        </div>
      </form>
    </Dialog>
  );
}

function Created({ text, close }: { text: string; close: () => void }) {
  return (
    <Dialog title="The key" close={close}>
      <p>Copy it now: it is not kept, and not shown again.</p>
      <p>
        <code class="secret">{text}</code>
      </p>
      <div class="buttons">
        <CopyButton text={() => text} />
        <Button label="Done" onClick={close} />
      </div>
    </Dialog>
  );
}

function Revoke({ value, close }: { value: ApiKey; close: () => void }) {
  const [problem, setProblem] = useState<string | null>(null);
  const revoke = () => send(`/admin/keys/${value.id}`, { method: "DELETE" }).then(close, (error) => setProblem(messageOf(error)));
  return (
    <Dialog title={`Revoke ${value.name}?`} close={close}>
      <p>Requests with this key are refused from now on. This cannot be undone.</p>
      {problem && <Problem text={problem} />}
      <div class="buttons">
        <Button kind="danger" icon="trash" label="Revoke for good" onClick={() => void revoke()} />
      </div>
    </Dialog>
  );
}
