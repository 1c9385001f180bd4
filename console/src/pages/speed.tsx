/** What `headrace bench` and `headrace tune` have measured on this machine. */

import { useEffect, useState } from "preact/hooks";

import { ApiError, getJson, isAbort, messageOf } from "../api";
import { bytes, ms, rate } from "../format";
import { session } from "../session";
import { useStore } from "../store";
import type { Curve, ModelCard, Point } from "../types";
import { Badge, CopyButton, Empty, Loading, PageHead, Problem } from "../ui";
import { COLOURS, type Line, Plot } from "../xy";
import { Limited } from "./now";

export function Speed() {
  const { models } = useStore(session);
  const [curves, setCurves] = useState<Curve[] | null>(null);
  const [error, setError] = useState<unknown>(null);
  useEffect(() => {
    const call = new AbortController();
    getJson<{ data: Curve[] }>("/admin/measurements", call.signal).then(
      ({ data }) => setCurves(data),
      (problem) => isAbort(problem) || setError(problem),
    );
    return () => call.abort();
  }, []);
  if (error instanceof ApiError && error.status === 403) return <Limited text={error.message} />;
  const of = (kind: Curve["kind"]) => curves?.filter((curve) => curve.kind === kind) ?? [];
  return (
    <>
      <PageHead title="Speed" note="What headrace bench and headrace tune have measured on this machine." />
      {error !== null && <Problem text={messageOf(error)} />}
      {!curves && error === null && <Loading />}
      {curves?.length === 0 && (
        <Empty title="Nothing was measured yet">
          Run these on the machine of this service, in a terminal, then open this page again.
          {commands(models).map(({ command, about }) => (
            <span key={command} class="command">
              <code>{command}</code> <CopyButton bare label={`Copy: ${command}`} text={() => command} />
              <span class="sub">{about}</span>
            </span>
          ))}
        </Empty>
      )}
      {of("bench").length > 0 && <Runs title="Bench" about="Answers of a service under growing load" curves={of("bench")} first={2} />}
      {groups(of("tune")).map((group) => (
        <Runs key={`${group[0]!.model} ${group[0]!.time}`} title={`Tune: ${group[0]!.model}`} about={`${group[0]!.machine}, ${group[0]!.time}`} curves={group} first={4} />
      ))}
    </>
  );
}

/** What to run for the first results. */
function commands(models: ModelCard[]): { command: string; about: string }[] {
  // A name that a shell would read otherwise is left out.
  const name = models.find(({ id, tasks }) => tasks.includes("generate") && /^[\w.:-]+$/.test(id))?.id ?? "smollm2";
  return [
    { command: `headrace bench ${name}`, about: "measures answers under growing load, of a server that it starts" },
    { command: `headrace bench --url ${location.origin} --model ${name}`, about: "measures this service" },
    { command: `headrace tune ${name}`, about: "finds the fastest engine and options for the model on this machine" },
  ];
}

/** The engines of each run of `tune`. */
function groups(curves: Curve[]): Curve[][] {
  const known = new Map<string, Curve[]>();
  for (const curve of curves) {
    const key = `${curve.model}\n${curve.time}`;
    known.set(key, [...(known.get(key) ?? []), curve]);
  }
  return [...known.values()];
}

interface RunsProps {
  title: string;
  about: string;
  curves: Curve[];
  /** How many are plotted at first. */
  first: number;
}

/** Runs beside each other: those that are chosen as plots, all as a table. */
function Runs({ title, about, curves, first }: RunsProps) {
  const measured = curves.map((curve, index) => (curve.points.length > 0 ? index : -1)).filter((index) => index >= 0);
  const [chosen, setChosen] = useState(() => measured.slice(0, first));
  const toggle = (index: number) =>
    setChosen(chosen.includes(index) ? chosen.filter((other) => other !== index) : [...chosen, index].slice(-COLOURS.length));
  const plotted = chosen.map((index) => curves[index]!);
  const between = plotted.some((curve) => curve.points.some((point) => point.between_p50_ms !== null));
  return (
    <section aria-label={title}>
      <h2>
        {title} <span class="faint">{about}</span>
      </h2>
      {plotted.length > 0 && (
        <div class="charts two">
          <Plot title="Time to the first token; dashed: 99th percentile" unit="tokens/s" lines={linesOf(plotted, "first_token")} />
          {between && <Plot title="Time between tokens; dashed: 99th percentile" unit="tokens/s" lines={linesOf(plotted, "between")} />}
        </div>
      )}
      <div class="scroll" tabIndex={0} role="region" aria-label={`Figures of ${title}`}>
        <table class="plain-grid runs">
          <thead>
            <tr>
              <th>
                <span class="hidden">Plotted</span>
              </th>
              <th>Run</th>
              <th>Load</th>
              <th class="number">Tokens/s</th>
              <th class="number">First token</th>
              <th class="number">99 %</th>
              <th class="number">Between</th>
              <th class="number">Memory</th>
            </tr>
          </thead>
          <tbody>
            {curves.map((curve, index) => (
              <Figures key={index} curve={curve} chosen={chosen.includes(index)} toggle={() => toggle(index)} />
            ))}
          </tbody>
        </table>
      </div>
    </section>
  );
}

function linesOf(curves: Curve[], figure: "first_token" | "between"): Line[] {
  return curves.map((curve, index) => ({
    name: named(curve),
    colour: COLOURS[index % COLOURS.length]!,
    places: curve.points.flatMap((point) => {
      const y = point[`${figure}_p50_ms`];
      return y === null ? [] : [{ label: point.load, x: point.tokens_per_s, y, high: point[`${figure}_p99_ms`] }];
    }),
  }));
}

function named(curve: Curve): string {
  return curve.kind === "tune" ? curve.title : `${curve.model}, ${curve.time.slice(0, 16).replace("T", " ")}`;
}

function Figures({ curve, chosen, toggle }: { curve: Curve; chosen: boolean; toggle: () => void }) {
  const rows: (Point | null)[] = curve.points.length > 0 ? curve.points : [null];
  return (
    <>
      {rows.map((point, index) => (
        <tr key={point?.load ?? ""}>
          {index === 0 && (
            <>
              <td rowSpan={rows.length}>
                {point && <input type="checkbox" aria-label={`Plot ${named(curve)}`} checked={chosen} onChange={toggle} />}
              </td>
              <th scope="row" rowSpan={rows.length}>
                {named(curve)}
                {curve.kind === "bench" && <span class="sub">{curve.title}</span>}
                {curve.fault && (
                  <span class="sub">
                    <Badge state="refused" /> {curve.fault}
                  </span>
                )}
              </th>
            </>
          )}
          <td>{point?.load ?? "–"}</td>
          <td class="number">{rate(point?.tokens_per_s)}</td>
          <td class="number">{ms(point?.first_token_p50_ms)}</td>
          <td class="number">{ms(point?.first_token_p99_ms)}</td>
          <td class="number">{ms(point?.between_p50_ms)}</td>
          {index === 0 && (
            <td class="number" rowSpan={rows.length}>
              {curve.memory === null ? "–" : bytes(curve.memory)}
            </td>
          )}
        </tr>
      ))}
    </>
  );
}
