/** What loading a model would need and do. */

import { useEffect, useState } from "preact/hooks";

import { getJson, isAbort, messageOf } from "../api";
import { bytes, count, span } from "../format";
import type { Plan } from "../types";
import { Badge, Dialog, Facts, Loading, memoryText, Problem } from "../ui";

export function planOf(model: string, signal?: AbortSignal): Promise<Plan> {
  return getJson<Plan>(`/admin/plan?model=${encodeURIComponent(model)}`, signal);
}

export function PlanDialog({ model, close }: { model: string; close: () => void }) {
  const [plan, setPlan] = useState<Plan | null>(null);
  const [problem, setProblem] = useState<string | null>(null);
  useEffect(() => {
    const call = new AbortController();
    planOf(model, call.signal).then(setPlan, (error) => isAbort(error) || setProblem(messageOf(error)));
    return () => call.abort();
  }, [model]);
  return (
    <Dialog title={`What loading ${model} needs`} close={close}>
      {problem ? <Problem text={problem} /> : plan ? <PlanView plan={plan} /> : <Loading />}
    </Dialog>
  );
}

export function PlanView({ plan }: { plan: Plan }) {
  const { need } = plan;
  return (
    <>
      <p>
        <Badge state={plan.loaded ? "ready" : plan.fits ? "ok" : "failed"} /> {plan.reason}
      </p>
      <Facts
        facts={[
          ["Engine", plan.engine],
          ["Memory", `${memoryText(need.devices)}, ${need.how}`],
          ...Object.entries(need.parts).map(([name, size]): [string, string] => [`– ${name.replace("_", " ")}`, bytes(size)]),
          ["Context", need.context_length && `${count(need.context_length)} tokens`],
          ["Requests at a time", need.max_running && count(need.max_running)],
          ["Load takes", need.load_s && `about ${span(need.load_s)}`],
          ["Largest context", plan.largest_context && `${count(plan.largest_context)} tokens`],
          ["Would be unloaded", plan.evict.join(", ")],
        ]}
      />
    </>
  );
}
