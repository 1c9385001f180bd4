/** What runs now: charts, devices, models, requests. */

import { useMemo, useState } from "preact/hooks";

import { Chart, type Series } from "../chart";
import { bytes, count, ms, rate, span } from "../format";
import { state, useOverview } from "../overview";
import { link } from "../route";
import type { Device, ModelStatus, Overview, Rates, Running, Sample } from "../types";
import { Badge, Bar, Empty, Loading, memoryText, PageHead, Problem } from "../ui";
import { Actions, LoadProgress, stateOf, useFirst } from "./actions";
import { PlanDialog } from "./plan";

export function Now() {
  const { overview, samples, problem, forbidden } = useOverview();
  if (forbidden) return <Limited text={problem ?? ""} />;
  if (!overview) return problem ? <Problem text={problem} /> : <Loading />;
  return (
    <>
      <PageHead title="Now" note={`${summary(overview)} · Headrace ${overview.version}`} />
      {problem && <Problem text={`${problem} What is shown may be old; it is tried again.`} />}
      <Charts samples={samples} overview={overview} />
      <Devices devices={overview.devices} models={overview.models} />
      <ModelTable models={overview.models} rates={overview.rates} />
      <RunningTable running={overview.running} total={overview.running_count} />
    </>
  );
}

/** What a key of a client sees of a page for operators. */
export function Limited({ text }: { text: string }) {
  return (
    <Empty title="This page needs an admin key">
      {text} The <a href={link("playground")}>playground</a> works with this key.
    </Empty>
  );
}

function summary({ models, running_count, rates }: Overview): string {
  const ready = models.filter((model) => model.state === "ready").length;
  const queued = models.reduce((sum, model) => sum + model.queued, 0);
  const speed = rates.reduce((sum, r) => sum + r.completion_tokens_per_second, 0);
  const parts = [`${ready} of ${models.length} models loaded`, `${running_count} running`];
  if (queued) parts.push(`${queued} waiting`);
  if (speed >= 0.05) parts.push(`${rate(speed)} tokens/s`);
  return parts.join(" · ");
}

function Charts({ samples, overview }: { samples: Sample[]; overview: Overview }) {
  const lines = useMemo(() => columns(samples, overview.devices), [samples]);
  const last = samples.at(-1);
  const booked = overview.devices.reduce((sum, device) => sum + device.booked, 0);
  return (
    <section class="charts" aria-label="The last 15 minutes">
      <Chart title="Tokens per second" now={rate(last?.completion_tokens_per_second ?? 0)} times={lines.times} series={lines.tokens} format={tick} />
      <Chart title="Time to first token" now={ms(last?.time_to_first_token_p50_ms)} times={lines.times} series={lines.first} format={ms} />
      <Chart title="Requests" now={`${last?.running ?? 0}`} times={lines.times} series={lines.requests} format={(value) => (Number.isInteger(value) ? String(value) : "")} />
      <Chart title="Memory of models" now={bytes(booked)} times={lines.times} series={lines.memory} format={bytes} />
    </section>
  );
}

function tick(value: number): string {
  return Number.isInteger(value) ? count(value) : rate(value);
}

const COLOURS = ["accent", "second", "third", "fourth"];

function columns(samples: Sample[], devices: Device[]) {
  const memory: Series[] = devices.map((device, index) => ({
    name: device.name,
    colour: COLOURS[index % COLOURS.length]!,
    values: samples.map((sample) => sample.memory[device.name] ?? null),
  }));
  const line = (name: string, colour: string, values: (number | null)[]): Series => ({ name, colour, values });
  return {
    times: samples.map((sample) => sample.time),
    tokens: [
      line("written", "accent", samples.map((sample) => sample.completion_tokens_per_second)),
      line("read", "second", samples.map((sample) => sample.prompt_tokens_per_second)),
    ],
    first: [line("median", "accent", samples.map((sample) => sample.time_to_first_token_p50_ms))],
    requests: [
      line("running", "accent", samples.map((sample) => sample.running)),
      line("waiting", "second", samples.map((sample) => sample.queued)),
    ],
    memory,
  };
}

function Devices({ devices, models }: { devices: Device[]; models: ModelStatus[] }) {
  return (
    <section>
      <h2>Devices</h2>
      {devices.length === 0 && <Empty title="No node is connected">This front answers when one is: see its log.</Empty>}
      <ul class="devices">
        {devices.map((device) => (
          <li key={device.name}>
            <DeviceRow device={device} models={models} />
          </li>
        ))}
      </ul>
    </section>
  );
}

function DeviceRow({ device, models }: { device: Device; models: ModelStatus[] }) {
  const held = models.map((model) => ({ name: model.id, size: model.memory[device.name] ?? 0 })).filter((part) => part.size > 0);
  const used = Math.max(0, device.total - device.free - device.booked);
  const parts = held.map((part, index) => ({ name: `${part.name}: ${bytes(part.size)}`, value: part.size, tone: `tone-${index % 4}` }));
  const text = `${bytes(device.booked)} of ${bytes(device.budget)} for models, ${bytes(device.free)} free of ${bytes(device.total)}`;
  return (
    <>
      <span class="device-name">{device.name}</span>
      <Bar
        parts={[...parts, { name: `other programs: ${bytes(used)}`, value: used, tone: "other" }]}
        whole={device.total}
        mark={device.budget}
        label={`${device.name}: ${text}`}
      />
      <span class="note">{text}</span>
    </>
  );
}

const MOST = 25;

function ModelTable({ models, rates }: { models: ModelStatus[]; rates: Rates[] }) {
  const [planned, setPlanned] = useState<string | null>(null);
  const [shown, more] = useFirst(models, MOST);
  return (
    <section>
      <h2>Models</h2>
      {models.length === 0 ? (
        <Empty title="No model is served">Add one to headrace.toml, or load one on the page Models.</Empty>
      ) : (
        <table class="grid models">
          <thead>
            <tr>
              <th>Model</th>
              <th>State</th>
              <th>Engine</th>
              <th class="number">Memory</th>
              <th class="number">Running</th>
              <th class="number">Waiting</th>
              <th class="number">Tokens/s</th>
              <th class="number">First token</th>
              <th>Unloads</th>
              <th>
                <span class="hidden">Actions</span>
              </th>
            </tr>
          </thead>
          <tbody>
            {shown.map((model) => (
              <ModelRow key={model.id} model={model} rates={rates.find((r) => r.model === model.id)} plan={() => setPlanned(model.id)} />
            ))}
          </tbody>
        </table>
      )}
      {more}
      {planned && <PlanDialog model={planned} close={() => setPlanned(null)} />}
    </section>
  );
}

function ModelRow({ model, rates, plan }: { model: ModelStatus; rates: Rates | undefined; plan: () => void }) {
  return (
    <tr>
      <th scope="row" data-label="Model">
        <span class="model-name">{model.id}</span>
        {model.aliases.length > 0 && <span class="sub">{model.aliases.join(", ")}</span>}
        <LoadProgress model={model} />
        {model.last_error && model.state !== "ready" && <span class="sub bad">{model.last_error}</span>}
      </th>
      <td data-label="State">
        <Badge state={stateOf(model)} />
      </td>
      <td data-label="Engine">
        {model.engine || "–"}
        <span class="sub">{[model.device, model.quantization].filter((part) => part && part !== "auto").join(" · ")}</span>
      </td>
      <td data-label="Memory" class="number">
        {memoryText(model.memory) || (model.estimated ? <span class="faint">about {memoryText(model.estimated.devices)}</span> : "–")}
      </td>
      <td data-label="Running" class="number">
        {model.running}
        {model.max_running !== null && <span class="faint"> / {count(model.max_running)}</span>}
      </td>
      <td data-label="Waiting" class="number">
        {model.queued}
      </td>
      <td data-label="Tokens/s" class="number">
        {rates && rates.completion_tokens_per_second > 0 ? rate(rates.completion_tokens_per_second) : "–"}
      </td>
      <td data-label="First token" class="number">
        {ms(rates?.time_to_first_token_p50_ms)}
      </td>
      <td data-label="Unloads">{until(model)}</td>
      <td class="actions">
        <Actions model={model} plan={plan} />
      </td>
    </tr>
  );
}

function until(model: ModelStatus): string {
  if (model.pinned) return "pinned";
  if (model.state !== "ready") return "–";
  if (model.until === null) return "never";
  return `in ${span(model.until - state.get().now)}`;
}

function RunningTable({ running, total }: { running: Running[]; total: number }) {
  return (
    <section>
      <h2>Running requests</h2>
      {running.length === 0 ? (
        <Empty title="No request is running">
          Requests appear here while they are answered; those that have ended are under <a href={link("requests")}>Requests</a>.
        </Empty>
      ) : (
        <table class="grid">
          <thead>
            <tr>
              <th>Request</th>
              <th>Model</th>
              <th>State</th>
              <th>Kind</th>
              <th>Key</th>
              <th class="number">Tokens</th>
              <th class="number">Time</th>
            </tr>
          </thead>
          <tbody>
            {running.map((request) => (
              <tr key={request.id}>
                <th scope="row" data-label="Request">
                  <code>{request.id.slice(0, 12)}</code>
                </th>
                <td data-label="Model">{request.model}</td>
                <td data-label="State">
                  <Badge state={request.phase} />
                </td>
                <td data-label="Kind">{request.operation}</td>
                <td data-label="Key">{request.client ? <code>{request.client.slice(0, 8)}</code> : "–"}</td>
                <td data-label="Tokens" class="number">
                  {count(request.prompt_tokens)} + {count(request.completion_tokens)}
                </td>
                <td data-label="Time" class="number">
                  {ms(Math.max(0, 1000 * (state.get().now - request.since)))}
                </td>
              </tr>
            ))}
          </tbody>
        </table>
      )}
      {total > running.length && <p class="note">The oldest {running.length} of {total} are shown.</p>}
    </section>
  );
}
