/** A plot of times over rates: a line for each run, the median solid and the 99th percentile dashed. */

import { ms, rate } from "./format";

export interface Place {
  label: string;
  x: number;
  y: number;
  /** The 99th percentile, null where it is not known. */
  high: number | null;
}

export interface Line {
  name: string;
  colour: string;
  places: Place[];
}

export const COLOURS = ["accent", "second", "third", "fourth"];
const WIDE = 460;
const HIGH = 250;
const LEFT = 56;
const BOTTOM = 36;
const TOP = 14;
const RIGHT = 16;

export function Plot({ title, unit, lines }: { title: string; unit: string; lines: Line[] }) {
  const places = lines.flatMap((line) => line.places);
  const far = top(Math.max(...places.map((place) => place.x)) * 1.05);
  const high = top(Math.max(...places.map((place) => Math.max(place.y, place.high ?? 0))) * 1.05);
  const x = (value: number) => LEFT + (value / far.end) * (WIDE - LEFT - RIGHT);
  const y = (value: number) => HIGH - BOTTOM - (value / high.end) * (HIGH - BOTTOM - TOP);
  const summary = lines.map((line) => `${line.name}: ${line.places.map((p) => `${p.label} ${ms(p.y)} at ${rate(p.x)}`).join(", ")}`).join("; ");
  return (
    <figure class="chart xy">
      <figcaption>
        <span class="name">{title}</span>
        <span class="legend">
          {lines.map((line) => (
            <span key={line.name} class={line.colour}>
              {line.name}
            </span>
          ))}
        </span>
      </figcaption>
      <svg viewBox={`0 0 ${WIDE} ${HIGH}`} role="img" aria-label={`${title}. ${summary}`}>
        {ticks(high).map((tick) => (
          <g key={tick}>
            <line class="rule" x1={LEFT} x2={WIDE - RIGHT} y1={y(tick)} y2={y(tick)} />
            <text class="tick" x={LEFT - 7} y={y(tick) + 4} text-anchor="end">
              {ms(tick)}
            </text>
          </g>
        ))}
        {ticks(far).map((tick) => (
          <text key={tick} class="tick" x={x(tick)} y={HIGH - BOTTOM + 16} text-anchor="middle">
            {tick}
          </text>
        ))}
        <text class="tick" x={(LEFT + WIDE - RIGHT) / 2} y={HIGH - 4} text-anchor="middle">
          {unit}
        </text>
        {lines.map((line) => (
          <g key={line.name} class={`line ${line.colour}`}>
            <polyline points={line.places.map((p) => `${x(p.x)},${y(p.y)}`).join(" ")} />
            <polyline class="dashed" points={line.places.filter((p) => p.high !== null).map((p) => `${x(p.x)},${y(p.high!)}`).join(" ")} />
            {line.places.map((p) => (
              <circle key={p.label} cx={x(p.x)} cy={y(p.y)} r="3.5">
                <title>{`${line.name}, ${p.label}: ${ms(p.y)} at ${rate(p.x)} tokens/s`}</title>
              </circle>
            ))}
          </g>
        ))}
      </svg>
    </figure>
  );
}

interface Axis {
  end: number;
  step: number;
}

/** The end of an axis that holds a value, and the step of its ticks: 1, 2 or 5 times a power of ten. */
function top(value: number): Axis {
  const least = (value || 1) / 5;
  const power = 10 ** Math.floor(Math.log10(least));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= least)!;
  return { end: Math.ceil((value || 1) / step) * step, step };
}

function ticks({ end, step }: Axis): number[] {
  return Array.from({ length: Math.round(end / step) + 1 }, (_, index) => Number((index * step).toPrecision(6)));
}
