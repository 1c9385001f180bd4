/** The models that are served, those on the disk, and what would fit. */

import { useEffect, useState } from "preact/hooks";

import { getJson, isAbort, messageOf, post } from "../api";
import { bytes, compact, count, moment } from "../format";
import { refresh, useOverview } from "../overview";
import { check, session } from "../session";
import { useStore } from "../store";
import type { ModelCard, ModelStatus, Plan, StoredModel } from "../types";
import { Badge, Button, Empty, Facts, Field, Loading, memoryText, PageHead, Problem } from "../ui";
import { Actions, LoadProgress, named, stateOf, useFirst } from "./actions";
import { Library } from "./library";
import { PlanDialog, planOf, PlanView } from "./plan";

const FIRST = 12;

export function Models() {
  const { overview, forbidden } = useOverview();
  const { models } = useStore(session);
  const [planned, setPlanned] = useState<string | null>(null);
  const names = overview?.models.map((model) => model.id).join() ?? "";
  useEffect(() => {
    // Models were added or removed since the list was read.
    if (names && names !== models.map((model) => model.id).join()) void check();
  }, [names]);
  const [shown, more] = useFirst(models, FIRST);
  return (
    <>
      <PageHead title="Models" note="What is served here, what would fit, and what is on the disk." />
      <section>
        <h2>Served</h2>
        {models.length === 0 && <Empty title="No model is served" />}
        <ul class="cards">
          {shown.map((card) => (
            <li key={card.id} class="panel">
              <ModelView card={card} status={overview?.models.find((model) => model.id === card.id)} plan={setPlanned} />
            </li>
          ))}
        </ul>
        {more}
      </section>
      {!forbidden && <Library plan={setPlanned} />}
      {!forbidden && <TryFit />}
      {!forbidden && <Disk served={overview?.models ?? []} plan={setPlanned} />}
      {planned && <PlanDialog model={planned} close={() => setPlanned(null)} />}
    </>
  );
}

function ModelView({ card, status, plan }: { card: ModelCard; status: ModelStatus | undefined; plan: (model: string) => void }) {
  return (
    <>
      <header>
        <h3>{card.id}</h3>
        <Badge state={status ? stateOf(status) : named(card.state)} />
      </header>
      {status && <LoadProgress model={status} />}
      {status?.last_error && status.state !== "ready" && <p class="sub bad">{status.last_error}</p>}
      <Facts
        facts={[
          ["Source", status?.source],
          ["Also named", card.aliases.join(", ")],
          [card.adapter ? "Adapter of" : "Preset of", card.base],
          ["Engine", card.engine],
          ["Why this engine", status?.engine_reason],
          ["Tasks", card.tasks.join(", ")],
          ["Size", card.parameters ? `${compact(card.parameters)} parameters` : ""],
          ["Quantization", card.quantization],
          ["Context", card.context_length ? `${count(card.context_length)} tokens` : ""],
          ["Memory", status && memoryText(status.memory)],
          ["Abilities", card.capabilities.map((name) => name.replaceAll("_", " ")).join(", ")],
        ]}
      />
      {status && <Actions model={status} plan={() => plan(card.id)} />}
    </>
  );
}

/** A form that shows what loading any reference would need, and loads it. */
function TryFit() {
  const [reference, setReference] = useState("");
  const [plan, setPlan] = useState<Plan | null>(null);
  const [problem, setProblem] = useState<string | null>(null);
  const [busy, setBusy] = useState<"" | "plan" | "load">("");
  const run = async (kind: "plan" | "load", work: () => Promise<void>) => {
    setBusy(kind);
    setProblem(null);
    await work().catch((error) => setProblem(messageOf(error)));
    setBusy("");
    refresh();
  };
  const show = () => run("plan", async () => setPlan(await planOf(reference.trim())));
  const load = () =>
    run("load", async () => {
      setPlan(null);
      await post("/admin/models/load", { model: reference.trim() });
      await check();
    });
  const submit = (event: Event) => {
    event.preventDefault();
    if (reference.trim()) void show();
  };
  return (
    <section>
      <h2>Any other model</h2>
      <form class="line-form" onSubmit={submit}>
        <Field label="Model" hint="A short name, a path, or a reference such as hub:org/name:Q4_K_M">
          <input type="text" spellcheck={false} autocomplete="off" value={reference} onInput={(event) => setReference(event.currentTarget.value)} />
        </Field>
        <Button type="submit" label={busy === "plan" ? "Estimating …" : "Estimate"} disabled={!reference.trim() || busy !== ""} />
        <Button kind="primary" label={busy === "load" ? "Loading …" : "Download and load"} disabled={!reference.trim() || busy !== ""} onClick={() => void load()} />
      </form>
      {problem && <Problem text={problem} />}
      {plan && (
        <div class="panel">
          <PlanView plan={plan} />
        </div>
      )}
    </section>
  );
}

function Disk({ served, plan }: { served: ModelStatus[]; plan: (model: string) => void }) {
  const [stored, setStored] = useState<StoredModel[] | null>(null);
  const [problem, setProblem] = useState<string | null>(null);
  const loaded = served.map((model) => model.state).join();
  useEffect(() => {
    const call = new AbortController();
    getJson<{ data: StoredModel[] }>("/admin/store", call.signal).then(
      ({ data }) => setStored(data),
      (error) => isAbort(error) || setProblem(messageOf(error)),
    );
    return () => call.abort();
  }, [loaded]);
  const total = stored?.reduce((sum, model) => sum + model.size, 0) ?? 0;
  return (
    <section>
      <h2>On the disk {total > 0 && <span class="faint">{bytes(total)}</span>}</h2>
      {problem && <Problem text={problem} />}
      {!stored && !problem && <Loading />}
      {stored?.length === 0 && <Empty title="No model was downloaded yet"><code>headrace pull NAME</code>, or the form above, downloads one.</Empty>}
      {stored && stored.length > 0 && (
        <table class="grid">
          <thead>
            <tr>
              <th>Model</th>
              <th>Reference</th>
              <th class="number">Size</th>
              <th>Added</th>
              <th>
                <span class="hidden">Actions</span>
              </th>
            </tr>
          </thead>
          <tbody>
            {stored.map((model) => (
              <tr key={model.reference}>
                <th scope="row" data-label="Model">
                  {model.name}
                </th>
                <td data-label="Reference">
                  <code>{model.reference}</code>
                </td>
                <td data-label="Size" class="number">
                  {bytes(model.size)}
                </td>
                <td data-label="Added">{model.added ? moment(model.added) : "–"}</td>
                <td class="actions">
                  <Button label="Does it fit?" aria-label={`Does it fit? ${model.name}`} onClick={() => plan(model.reference)} />
                </td>
              </tr>
            ))}
          </tbody>
        </table>
      )}
    </section>
  );
}
