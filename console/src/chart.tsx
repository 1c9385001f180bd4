/** A line chart over time, in the colours of the page. */

import { useEffect, useRef } from "preact/hooks";
import uPlot from "uplot";
import "uplot/dist/uPlot.min.css";

import { theme } from "./theme";
import { useStore } from "./store";

export interface Series {
  name: string;
  /** One value for each time; null where there is none. */
  values: (number | null)[];
  colour: string;
  bars?: boolean;
}

interface Props {
  title: string;
  now: string;
  times: number[];
  series: Series[];
  format: (value: number) => string;
  height?: number;
  /** Days on the axis, not times. */
  days?: boolean;
}

export function Chart({ title, now, times, series, format, height = 116, days = false }: Props) {
  const place = useRef<HTMLDivElement>(null);
  const plot = useRef<uPlot | null>(null);
  const mode = useStore(theme);
  const names = series.map((line) => line.name).join();
  const data = [times, ...series.map((line) => line.values)] as uPlot.AlignedData;

  useEffect(() => {
    const root = place.current;
    if (!root) return;
    const chart = new uPlot(options(root, series, format, height, days), data, root);
    plot.current = chart;
    const observer = new ResizeObserver(() => chart.setSize({ width: root.clientWidth, height }));
    observer.observe(root);
    const scheme = matchMedia("(prefers-color-scheme: dark)");
    const redraw = () => chart.redraw(false, true);
    scheme.addEventListener("change", redraw);
    return () => {
      observer.disconnect();
      scheme.removeEventListener("change", redraw);
      chart.destroy();
    };
  }, [names, mode, height, days]);
  useEffect(() => plot.current?.setData(data), [times, series]);

  return (
    <figure class="chart">
      <figcaption>
        <span class="name">{title}</span>
        <span class="value">{now}</span>
        {series.length > 1 && (
          <span class="legend">
            {series.map((line) => (
              <span key={line.name} class={line.colour}>
                {line.name}
              </span>
            ))}
          </span>
        )}
      </figcaption>
      <div ref={place} class="plot" role="img" aria-label={`${title}: ${now}`} />
    </figure>
  );
}

const DAY = 86_400;

function colour(root: Element, name: string): string {
  return getComputedStyle(root).getPropertyValue(`--${name}`).trim();
}

/** The value of a custom property as a canvas understands it. */
function resolved(root: HTMLElement, name: string): string {
  const probe = document.createElement("span");
  probe.style.color = colour(root, name);
  root.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}

function options(
  root: HTMLElement,
  series: Series[],
  format: (value: number) => string,
  height: number,
  days: boolean,
): uPlot.Options {
  const stroke = (name: string) => () => resolved(root, name);
  const font = "11px system-ui, sans-serif";
  const grid = { stroke: stroke("line"), width: 1 };
  return {
    width: root.clientWidth || 300,
    height,
    padding: [8, 4, 0, 0],
    legend: { show: false },
    cursor: { y: false, points: { size: 6 }, drag: { x: false, y: false } },
    scales: {
      x: days ? { time: true, range: (_plot, low, high) => [low - DAY / 2, high + DAY / 2] } : { time: true },
      y: { range: (_plot, _low, high) => [0, high > 0 ? high * 1.1 : 1] },
    },
    axes: [
      {
        stroke: stroke("faint"),
        font,
        grid: { show: false },
        ticks: { show: false },
        size: 22,
        space: days ? 60 : 76,
        ...(days ? { incrs: [1, 2, 7, 14, 30, 90, 365].map((count) => count * DAY) } : {}),
        values: (plot, ticks) => {
          const short = (ticks[1] ?? 0) - (ticks[0] ?? 0) < 60;
          // A label that does not fit at the right edge is left out, as it would be cut.
          const last = plot.over.clientWidth - 24;
          return ticks.map((tick) => (plot.valToPos(tick, "x") > last ? "" : days ? day(tick) : clock(tick, short)));
        },
      },
      {
        stroke: stroke("faint"),
        font,
        grid,
        ticks: { show: false },
        size: 52,
        space: 34,
        values: (_plot, ticks) => ticks.map(format),
      },
    ],
    series: [
      {},
      ...series.map((line) => {
        const base = { label: line.name, stroke: stroke(line.colour), width: 1.5, points: { show: true, size: 4, filter: isolated }, spanGaps: false };
        return line.bars
          ? { ...base, points: { show: false }, fill: stroke(line.colour), paths: uPlot.paths.bars!({ size: [0.6, 40] }) }
          : base;
      }),
    ],
  };
}

/** The values without a neighbour, of which no line can be drawn. */
function isolated(plot: uPlot, index: number): number[] {
  const values = plot.data[index]!;
  return [...values.keys()].filter((i) => values[i] != null && values[i - 1] == null && values[i + 1] == null);
}

function clock(unix: number, seconds: boolean): string {
  return new Date(unix * 1000).toTimeString().slice(0, seconds ? 8 : 5);
}

function day(unix: number): string {
  return new Date(unix * 1000).toISOString().slice(5, 10);
}
