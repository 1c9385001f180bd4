/** Chats with one model, or with two beside each other. */

import type { TargetedEvent } from "preact";
import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";

import { currentKey } from "../api";
import { moment } from "../format";
import { check, session } from "../session";
import { useStore } from "../store";
import type { ModelCard } from "../types";
import { Button, download, Empty } from "../ui";
import { Composer } from "./composer";
import type { Lane, Turn } from "./conversation";
import { asCurl, asPython, bodyOf } from "./request";
import { SettingsPanel } from "./settings";
import { AnswerView, ToolView, UserView } from "./turns";
import { add, again, answerCalls, change, type Control, drop, open, rewrite, useConversations } from "./use-conversation";

export function Playground() {
  const { models } = useStore(session);
  const chats = models.filter((model) => model.tasks.includes("generate"));
  // Models may have been added since the page was loaded.
  useEffect(() => void check(), []);
  if (chats.length === 0) {
    return <Empty title="No model that answers chats is served">Add one to headrace.toml, or load one on the page Models.</Empty>;
  }
  return <Chats models={chats} />;
}

function Chats({ models }: { models: ModelCard[] }) {
  const control = useConversations(models[0]!.id);
  const [panel, setPanel] = useState<"" | "list" | "settings">("");
  const { current, writing } = control;
  const busy = writing.some((stage) => stage !== null && stage !== undefined);
  const toggle = (name: "list" | "settings") => setPanel(panel === name ? "" : name);
  return (
    <div class={`playground show-${panel || "none"}`}>
      <h1 class="hidden">Playground</h1>
      <ConversationList control={control} />
      <div class="talk">
        <Toolbar control={control} models={models} busy={busy} panel={panel} toggle={toggle} />
        <div class={`lanes lanes-${current.lanes.length}`}>
          {current.lanes.map((lane, place) => (
            <LaneView key={`${current.id} ${place}`} lane={lane} place={place} control={control} />
          ))}
        </div>
        {control.problem && (
          <p class="error" role="alert">
            {control.problem}
          </p>
        )}
        <Composer busy={busy} blind={blindness(current.lanes, models)} />
      </div>
      <SettingsPanel settings={current.settings} change={(part) => change((next) => Object.assign(next.settings, part))} />
    </div>
  );
}

function blindness(lanes: Lane[], models: ModelCard[]): string | null {
  const blind = lanes
    .map((lane) => models.find((model) => model.id === lane.model))
    .filter((model) => model && !model.capabilities.includes("vision"))
    .map((model) => model!.id);
  return blind.length > 0 ? `${blind.join(" and ")} does not take pictures, as far as is known.` : null;
}

interface ToolbarProps {
  control: Control;
  models: ModelCard[];
  busy: boolean;
  panel: string;
  toggle: (name: "list" | "settings") => void;
}

function Toolbar({ control, models, busy, panel, toggle }: ToolbarProps) {
  const { current } = control;
  const pair = current.lanes.length === 2;
  const choose = (place: number, model: string) => change((next) => (next.lanes[place]!.model = model));
  const compare = () =>
    change((next) => {
      if (pair) next.lanes.pop();
      else next.lanes.push({ model: models.find((model) => model.id !== next.lanes[0]!.model)?.id ?? next.lanes[0]!.model, turns: beforeLast(next.lanes[0]!.turns) });
    });
  return (
    <div class="toolbar">
      <Button icon="list" bare class="only-narrow" label="Conversations" aria-expanded={panel === "list"} onClick={() => toggle("list")} />
      {current.lanes.map((lane, place) => (
        <select key={place} aria-label={pair ? `Model ${place + 1}` : "Model"} value={lane.model} disabled={busy} onChange={(event) => choose(place, event.currentTarget.value)}>
          {!models.some((model) => model.id === lane.model) && <option>{lane.model}</option>}
          {models.map((model) => (
            <option key={model.id}>{model.id}</option>
          ))}
        </select>
      ))}
      <Button icon="columns" label={pair ? "One model" : "Compare"} disabled={busy} aria-pressed={pair} onClick={compare} />
      <span class="space" />
      <Button icon="save" bare label="Export the conversation" disabled={current.lanes.every((lane) => lane.turns.length === 0)} onClick={() => download(`conversation-${current.id}.json`, JSON.stringify(current, null, 2))} />
      <Button icon="tune" bare class="only-narrow" label="Settings" aria-expanded={panel === "settings"} onClick={() => toggle("settings")} />
      <Button icon="plus" bare class="only-narrow" label="New conversation" onClick={() => open(null)} />
    </div>
  );
}

/** The turns that a second model gets: up to the last question, which it can answer too. */
function beforeLast(turns: Turn[]): Turn[] {
  const last = turns.findLastIndex((turn) => turn.role !== "assistant");
  // The figures are those of the first model.
  return turns.slice(0, last + 1).map((turn) => (turn.role === "assistant" ? { ...turn, metrics: null } : turn));
}

function ConversationList({ control }: { control: Control }) {
  const { all, current } = control;
  const picker = useRef<HTMLInputElement>(null);
  return (
    <aside class="conversations" aria-label="Conversations">
      <Button icon="plus" label="New conversation" onClick={() => open(null)} />
      {all.length === 0 && <p class="note">Conversations are kept in this browser.</p>}
      <ul>
        {all.map((conversation) => (
          <li key={conversation.id}>
            <button type="button" class="conversation" aria-current={conversation.id === current.id ? "true" : undefined} onClick={() => open(conversation.id)}>
              <span>{conversation.title}</span>
              <span class="sub">
                {conversation.lanes.map((lane) => lane.model).join(" · ")} · {moment(conversation.updated / 1000)}
              </span>
            </button>
            <Button icon="trash" bare kind="quiet" label={`Delete ${conversation.title}`} onClick={() => drop(conversation.id)} />
          </li>
        ))}
      </ul>
      <div class="buttons">
        {all.length > 0 && <Button icon="save" kind="quiet" label="Export all" onClick={() => download("conversations.json", JSON.stringify(all, null, 2))} />}
        <Button icon="load" kind="quiet" label="Import" onClick={() => picker.current?.click()} />
        <input
          ref={picker}
          type="file"
          class="hidden"
          tabIndex={-1}
          aria-hidden="true"
          accept=".json,application/json"
          onChange={({ currentTarget }) => {
            const file = currentTarget.files?.[0];
            if (file) void add(file);
            currentTarget.value = "";
          }}
        />
      </div>
    </aside>
  );
}

function LaneView({ lane, place, control }: { lane: Lane; place: number; control: Control }) {
  const { current, writing } = control;
  const end = useRef<HTMLDivElement>(null);
  const follow = useRef(true);
  const stage = writing[place] ?? null;
  const last = lane.turns.length - 1;
  useLayoutEffect(() => {
    const box = end.current;
    if (box && follow.current) box.scrollTop = box.scrollHeight;
  });
  // Comes a frame after the scroll, when the page may be another: `end` is null then.
  const scrolled = ({ currentTarget: box }: TargetedEvent<HTMLDivElement>) => {
    follow.current = box.scrollHeight - box.scrollTop - box.clientHeight < 60;
  };
  const before = (index: number) => bodyOf({ model: lane.model, turns: lane.turns.slice(0, index) }, current.settings);
  return (
    <div class="lane" ref={end} onScroll={scrolled} role="log" aria-live="off" aria-label={`Conversation with ${lane.model}`} tabIndex={0}>
      {current.lanes.length > 1 && <p class="lane-head">{lane.model}</p>}
      {lane.turns.length === 0 && <Empty title={`Chat with ${lane.model}`}>Pictures can be dropped or pasted. Nothing leaves this browser but the requests to this service.</Empty>}
      {lane.turns.map((turn, index) => {
        if (turn.role === "user") return <UserView key={index} turn={turn} edit={stage === null ? () => rewrite(lane.turns, index) : null} />;
        if (turn.role === "tool") return <ToolView key={index} turn={turn} />;
        return (
          <AnswerView
            key={index}
            turn={turn}
            model={lane.model}
            stage={index === last ? stage : null}
            last={index === last}
            again={() => again(place)}
            answerCalls={(results) => answerCalls(place, results)}
            curl={() => asCurl(before(index), currentKey() !== null)}
            python={() => asPython(before(index), currentKey() !== null)}
          />
        );
      })}
      {last >= 0 && lane.turns[last]!.role !== "assistant" && stage === null && (
        <Button icon="again" label="Answer" onClick={() => again(place)} />
      )}
    </div>
  );
}
