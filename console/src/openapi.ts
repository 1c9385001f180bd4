/** openapi.json, as far as the page of the API reads it. */

import type { ModelCard } from "./types";

export interface Schema {
  $ref?: string;
  title?: string;
  type?: string | string[];
  description?: string;
  properties?: Record<string, Schema>;
  required?: string[];
  items?: Schema;
  anyOf?: Schema[];
  oneOf?: Schema[];
  enum?: unknown[];
  const?: unknown;
  default?: unknown;
  minimum?: number;
  maximum?: number;
  minLength?: number;
  maxLength?: number;
  minItems?: number;
  maxItems?: number;
  contentSchema?: Schema;
  additionalProperties?: unknown;
}

interface Parameter {
  name: string;
  in: string;
  required: boolean;
  schema: Schema;
}

type Content = Record<string, { schema?: Schema; itemSchema?: Schema }>;

export interface Spec {
  paths: Record<
    string,
    Record<
      string,
      {
        operationId: string;
        summary: string;
        parameters?: Parameter[];
        requestBody?: { content: Content };
        responses: Record<string, { description: string; content: Content }>;
      }
    >
  >;
  components: { schemas: Record<string, Schema> };
}

export interface Answer {
  status: string;
  kind: string;
  text: string;
  schema: Schema | null;
}

export interface Operation {
  id: string;
  method: string;
  path: string;
  group: string;
  summary: string;
  parameters: Parameter[];
  body: Schema | null;
  /** Whether the body is a form with a file, not JSON. */
  form: boolean;
  answers: Answer[];
}

const GROUPS: [name: string, paths: RegExp][] = [
  ["Models of this service", /^\/(admin|models)\/|_lora_adapter$/],
  ["Anthropic's API", /^\/v1\/messages/],
  ["Ollama's API", /^\/(api\/|$)/],
  ["Health and metrics", /^\/(health|metrics)/],
  ["Tokens", /^\/(de)?tokenize/],
  ["OpenAI's API", /^\/v1\/(models|chat|completions|responses|embeddings)/],
  ["Embeddings, rerank and scores", /./],
];
const ORDER = ["OpenAI's API", "Anthropic's API", "Ollama's API", "Embeddings, rerank and scores", "Tokens", "Models of this service", "Health and metrics"];

/** The routes, by groups. */
export function operations(spec: Spec): Operation[] {
  const all = Object.entries(spec.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, operation]): Operation => {
      const content = operation.requestBody?.content ?? {};
      const form = content["multipart/form-data"]?.schema;
      const body = content["application/json"]?.schema ?? form ?? null;
      return {
        id: `${method}-${path.replace(/\W+/g, "-").replace(/^-|-$/g, "")}`,
        method: method.toUpperCase(),
        path,
        group: GROUPS.find(([, paths]) => paths.test(path))![0],
        summary: operation.summary,
        parameters: operation.parameters ?? [],
        body,
        form: form !== undefined,
        answers: Object.entries(operation.responses).flatMap(([status, { description, content }]) =>
          Object.entries(content).map(([kind, { schema, itemSchema }]) => ({
            status,
            kind,
            text: description,
            schema: schema ?? itemSchema ?? null,
          })),
        ),
      };
    }),
  );
  return all.sort((a, b) => ORDER.indexOf(a.group) - ORDER.indexOf(b.group));
}

/** A type in short: `number 0 to 2`, `"low" | "high"`, `ChatMessage[]`. */
export function typeText(schema: Schema): string {
  if (schema.$ref) return schema.$ref.split("/").at(-1)!;
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  const kinds = schema.anyOf ?? schema.oneOf;
  if (kinds) return kinds.map(typeText).join(" | ");
  if (schema.type === "array") return `${schema.items ? wrapped(typeText(schema.items)) : "any"}[]${bounds(schema.minItems, schema.maxItems)}`;
  const name = Array.isArray(schema.type) ? schema.type.join(" | ") : (schema.type ?? "any");
  return name + bounds(schema.minimum ?? schema.minLength, schema.maximum ?? schema.maxLength);
}

function wrapped(text: string): string {
  return text.includes(" | ") ? `(${text})` : text;
}

function bounds(low: number | undefined, high: number | undefined): string {
  if (low !== undefined && high !== undefined) return ` ${low} to ${high}`;
  if (low !== undefined) return ` from ${low}`;
  return high !== undefined ? ` up to ${high}` : "";
}

const CHAT = { messages: [{ role: "user", content: "Name three rivers." }] };
const RANKING = { query: "Which are rivers?", documents: ["The Danube is a river.", "The Alps are mountains."] };
const KNOWN: [path: RegExp, body: object][] = [
  [/\/chat(\/completions)?$|apply-template$/, CHAT],
  [/^\/v1\/messages/, { max_tokens: 200, ...CHAT }],
  [/^\/v1\/completions$/, { prompt: "The Danube is", max_tokens: 32 }],
  [/^\/api\/generate$/, { prompt: "Name three rivers." }],
  [/^\/v1\/responses/, { input: "Name three rivers." }],
  [/^\/api\/embeddings$/, { prompt: "The Danube is a river." }],
  [/embed/, { input: ["The Danube is a river."] }],
  [/rerank(ing)?$|relevance$/, RANKING],
  [/^\/completions?$/, { prompt: "The Danube is", n_predict: 32 }],
  [/infill$/, { input_prefix: "def add(a, b):\n    return ", input_suffix: "\n" }],
  [/batches$/, { input_file_id: "FILE_ID", endpoint: "/v1/chat/completions", completion_window: "24h" }],
  [/files$/, { purpose: "batch", file: "@requests.jsonl" }],
  [/keys$/, { name: "laptop", limits: { requests_per_minute: 60 } }],
  [/keys\/\{id\}$/, { limits: { requests_per_minute: 60 } }],
  [/drain$/, { node: "NODE", on: true }],
  [/score$/, { text_1: "Which are rivers?", text_2: ["The Danube is a river."] }],
  [/^\/tokenize$/, { content: "Hello" }],
  [/^\/detokenize$/, { tokens: [72, 101] }],
  [/^\/admin\/models\/pin$/, { pinned: true }],
  [/^\/admin\/models\/update$/, { settings: { keep_alive: "5m" } }],
];

/** A served model for a route: one of its task, or else any. */
function modelFor(path: string, models: ModelCard[]): string {
  const task = /embed/.test(path) ? "embed" : /rerank|score|relevance/.test(path) ? "rerank" : "generate";
  return (models.find((model) => model.tasks.includes(task)) ?? models[0])?.id ?? "MODEL";
}

/** An example of a body, or null if the route has none. */
export function sampleOf(operation: Operation, spec: Spec, models: ModelCard[]): Record<string, unknown> | null {
  if (!operation.body) return null;
  const kind = operation.body.$ref ? spec.components.schemas[operation.body.$ref.split("/").at(-1)!] : operation.body;
  const known = KNOWN.find(([path]) => path.test(operation.path))?.[1] ?? {};
  const sample: Record<string, unknown> = kind?.properties?.model ? { model: modelFor(operation.path, models) } : {};
  // What nobody can guess is in capitals.
  for (const name of kind?.required ?? []) sample[name] ??= kind?.properties?.[name]?.type === "string" ? name.toUpperCase() : null;
  for (const [name, value] of Object.entries(known)) if (kind?.properties?.[name]) sample[name] = value;
  return sample;
}

/** Examples of the parameters that a route needs; what has to be looked up is in capitals. */
export function valuesOf(operation: Operation, models: ModelCard[]): Record<string, string> {
  const needed = operation.parameters.filter((parameter) => parameter.required);
  const value = (name: string) => (/^model|^name$/.test(name) ? modelFor(operation.path, models) : name.toUpperCase());
  return Object.fromEntries(needed.map(({ name }) => [name, value(name)]));
}
