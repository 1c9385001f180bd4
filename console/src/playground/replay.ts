/** Opens a recorded request in the playground. */

import type { Trace } from "../types";
import { type Conversation, fresh, NO_SETTINGS, save, type Settings, type Turn } from "./conversation";
import { opened } from "./opened";

interface Message {
  role: string;
  content?: unknown;
  tool_calls?: { id?: string; name?: string; arguments?: unknown; function?: { name?: string; arguments?: unknown } }[];
  tool_call_id?: string;
}

/** Raises Error if its content is not a conversation. */
export async function replay(trace: Trace): Promise<void> {
  const conversation = conversationOf(trace);
  await save(conversation);
  opened.set(conversation.id);
}

export function conversationOf(trace: Trace): Conversation {
  const asked = trace.content?.asked;
  const messages: Message[] = typeof asked === "string" ? [{ role: "user", content: asked }] : Array.isArray(asked) ? asked : [];
  if (!messages.every((message) => typeof message === "object" && message !== null && "role" in message)) {
    throw new Error("Only chats and completions can be replayed here.");
  }
  const conversation = fresh([trace.model], settingsOf(trace));
  conversation.title = `Replay of ${trace.id.slice(0, 12)}`;
  for (const message of messages) {
    if (message.role === "system" || message.role === "developer") conversation.settings.system += textOf(message.content);
    else conversation.lanes[0]!.turns.push(turnOf(message));
  }
  return conversation;
}

function settingsOf(trace: Trace): Settings {
  const settings = { ...NO_SETTINGS };
  for (const name of ["temperature", "top_p", "max_tokens", "seed"] as const) {
    const value = trace.parameters?.[name];
    if (typeof value === "number") settings[name] = String(value);
  }
  return settings;
}

function turnOf(message: Message): Turn {
  if (message.role === "assistant") {
    const calls = (message.tool_calls ?? []).map((call) => {
      const given = call.function?.arguments ?? call.arguments ?? "";
      return {
        id: call.id ?? "",
        name: call.function?.name ?? call.name ?? "",
        arguments: typeof given === "string" ? given : JSON.stringify(given),
      };
    });
    return { role: "assistant", text: textOf(message.content), thinking: "", calls, metrics: null, finish: "stop", error: null };
  }
  if (message.role === "tool") {
    return { role: "tool", id: message.tool_call_id ?? "", name: "", text: textOf(message.content) };
  }
  return { role: "user", text: textOf(message.content), images: [] };
}

function textOf(content: unknown): string {
  if (typeof content === "string") return content;
  if (!Array.isArray(content)) return "";
  return content.map((part) => (typeof part === "string" ? part : (part?.text ?? ""))).join("");
}
