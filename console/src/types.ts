/** What the API sends, as far as the pages use it. */

export interface Usage {
  prompt_tokens: number;
  cached_tokens: number;
  completion_tokens: number;
  reasoning_tokens: number;
  drafted_tokens: number;
  accepted_tokens: number;
}

export interface DeviceUse {
  name: string;
  total: number;
  worker_mean: number;
  worker_peak: number;
  busy_mean: number | null;
  busy_peak: number | null;
  joules: number | null;
}

export interface Metrics {
  started_at: number;
  queue_ms: number | null;
  load_ms: number;
  time_to_first_token_ms: number | null;
  prefill_ms: number | null;
  prefill_tokens_per_second: number | null;
  time_per_output_token_ms: number | null;
  decode_tokens_per_second: number | null;
  inter_token_ms: { p50: number; p99: number; max: number } | null;
  total_ms: number;
  usage: Usage;
  devices: DeviceUse[];
  engine: string;
  worker: string;
  continuations: number;
}

export interface ModelCard {
  id: string;
  aliases: string[];
  engine: string;
  state: string;
  tasks: string[];
  capabilities: string[];
  context_length: number | null;
  parameters: number | null;
  quantization: string | null;
  tools: string;
  thinking: string;
  base: string | null;
  adapter: boolean;
}

export interface Footprint {
  devices: Record<string, number>;
  how: "estimated" | "measured";
  parts: Record<string, number>;
  load_s: number | null;
  context_length: number | null;
  max_running: number | null;
}

export interface Device {
  name: string;
  total: number;
  budget: number;
  booked: number;
  free: number;
}

export interface ModelStatus {
  id: string;
  source: string;
  state: string;
  aliases: string[];
  engine: string;
  engine_reason: string;
  device: string;
  quantization: string | null;
  context_length: number | null;
  enabled: boolean;
  pinned: boolean;
  keep_alive: number;
  estimated: Footprint | null;
  memory: Record<string, number>;
  running: number;
  max_running: number | null;
  queued: number;
  max_queued: number;
  until: number | null;
  restarts: number;
  evictions: number;
  last_error: string | null;
  retry_at: number | null;
  progress: string | null;
  done: number;
  total: number;
  replicas: { number: number; state: string; reason: string | null }[];
}

export interface Rates {
  model: string;
  requests: number;
  failed: number;
  prompt_tokens_per_second: number;
  completion_tokens_per_second: number;
  time_to_first_token_p50_ms: number | null;
  time_to_first_token_p99_ms: number | null;
}

export interface Running {
  id: string;
  model: string;
  operation: string;
  client: string;
  since: number;
  phase: string;
  prompt_tokens: number;
  completion_tokens: number;
}

export interface Overview {
  version: string;
  models: ModelStatus[];
  devices: Device[];
  running: Running[];
  running_count: number;
  rates: Rates[];
}

export interface Sample {
  time: number;
  running: number;
  queued: number;
  prompt_tokens_per_second: number;
  completion_tokens_per_second: number;
  time_to_first_token_p50_ms: number | null;
  memory: Record<string, number>;
}

export interface Plan {
  model: string;
  engine: string;
  need: Footprint;
  fits: boolean;
  loaded: boolean;
  evict: string[];
  largest_context: number | null;
  reason: string;
  devices: Device[];
}

export interface Span {
  name: string;
  span_id: string;
  parent_id: string;
  start_ms: number;
  ms: number;
  failed?: boolean;
  attributes?: Record<string, unknown>;
}

export interface Trace {
  id: string;
  trace_id: string;
  time: number;
  operation: string;
  model: string;
  outcome: "ok" | "refused" | "error" | "cancelled";
  metrics: Metrics;
  client?: string;
  finish_reasons?: string[];
  error?: string;
  message?: string;
  parameters?: Record<string, unknown>;
  spans?: Span[];
  content?: { asked?: unknown; answered?: string[] };
}

export interface Amounts {
  requests: number;
  failed: number;
  refused: number;
  cancelled: number;
  prompt_tokens: number;
  cached_tokens: number;
  completion_tokens: number;
  reasoning_tokens: number;
  seconds: number;
  joules: number | null;
}

export interface UsageReport {
  by: string[];
  rows: { group: Record<string, string>; amounts: Amounts }[];
  total: Amounts;
}

export interface LibraryEntry {
  name: string;
  family: string;
  title: string;
  about: string;
  quantization: string;
  size: number;
  context_length: number;
  license: string;
  abilities: string[];
  task: "generate" | "embed" | "rerank";
  needs: Record<string, number>;
  fits: boolean;
  reason: string;
  tokens_per_second: number | null;
  stored: boolean;
}

export interface PullState {
  status: string;
  total?: number;
  completed?: number;
}

export interface Point {
  load: string;
  tokens_per_s: number;
  first_token_p50_ms: number | null;
  first_token_p99_ms: number | null;
  between_p50_ms: number | null;
  between_p99_ms: number | null;
}

export interface Curve {
  kind: "bench" | "tune";
  model: string;
  title: string;
  time: string;
  machine: string;
  fault: string | null;
  memory: number | null;
  points: Point[];
}

export interface StoredModel {
  name: string;
  reference: string;
  size: number;
  added: number;
  revision: string | null;
}

export interface KeyLimits {
  requests_per_minute?: number;
  requests_per_day?: number;
  tokens_per_minute?: number;
  tokens_per_day?: number;
  concurrent?: number;
}

/** A key of the database, without the key itself; times are Unix seconds. */
export interface ApiKey {
  id: string;
  name: string;
  scope: "inference" | "admin";
  limits: KeyLimits;
  models: string[];
  created: number;
  last_used: number | null;
  revoked: number | null;
  used: {
    minute_requests: number;
    minute_tokens: number;
    day_requests: number;
    day_tokens: number;
    running: number;
  };
}
