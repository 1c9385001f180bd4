/** The API of this service: an index of its routes, their fields, and a form that tries each. */

import { useEffect, useMemo, useState } from "preact/hooks";

import { currentKey, getJson, messageOf } from "../api";
import { Markdown } from "../markdown";
import { type Operation, operations, type Schema, type Spec, sampleOf, typeText, valuesOf } from "../openapi";
import { session } from "../session";
import { useStore } from "../store";
import { Badge, CopyButton, Empty, Field, Folded, Loading, PageHead, Problem } from "../ui";
import { curlOf, TryIt } from "./try-it";

export function Docs() {
  const [spec, setSpec] = useState<Spec | null>(null);
  const [problem, setProblem] = useState<string | null>(null);
  const [filter, setFilter] = useState("");
  useEffect(() => {
    getJson<Spec>("/openapi.json").then(setSpec, (error) => setProblem(messageOf(error)));
  }, []);
  const all = useMemo(() => (spec ? operations(spec) : []), [spec]);
  useEffect(() => {
    // An address with a fragment leads to a route.
    if (all.length > 0) document.getElementById(location.hash.slice(1))?.scrollIntoView();
  }, [all]);
  if (problem) return <Problem text={problem} />;
  if (!spec) return <Loading />;
  const words = filter.toLowerCase().split(/\s+/);
  const shown = all.filter((operation) => words.every((word) => `${operation.method} ${operation.path} ${operation.summary}`.toLowerCase().includes(word)));
  const groups = [...new Set(shown.map((operation) => operation.group))];
  return (
    <>
      <PageHead
        title="API"
        note={
          <>
            Routes of this service, from <a href="/openapi.json">openapi.json</a>.
          </>
        }
      />
      <div class="docs">
        <nav class="index" aria-label="Routes">
          <Field label="Find a route">
            <input type="search" value={filter} onInput={(event) => setFilter(event.currentTarget.value)} />
          </Field>
          {groups.map((group) => (
            <section key={group}>
              <h2>{group}</h2>
              <ul>
                {shown
                  .filter((operation) => operation.group === group)
                  .map((operation) => (
                    <li key={operation.id}>
                      <a href={`#${operation.id}`}>
                        <span class={`method ${operation.method}`}>{operation.method}</span> {operation.path}
                      </a>
                    </li>
                  ))}
              </ul>
            </section>
          ))}
        </nav>
        <div class="routes">
          {shown.length === 0 && <Empty title="No route matches" />}
          {shown.map((operation) => (
            <Route key={operation.id} operation={operation} spec={spec} />
          ))}
        </div>
      </div>
    </>
  );
}

function Route({ operation, spec }: { operation: Operation; spec: Spec }) {
  const { models } = useStore(session);
  const sample = useMemo(() => sampleOf(operation, spec, models), [operation, spec, models]);
  const values = useMemo(() => valuesOf(operation, models), [operation, models]);
  return (
    <article class="panel route" id={operation.id}>
      <header>
        <h3>
          <span class={`method ${operation.method}`}>{operation.method}</span> <code>{operation.path}</code>
        </h3>
        <CopyButton label="curl" text={() => curlOf(operation, sample, values, currentKey() !== null)} />
      </header>
      <Markdown text={operation.summary} />
      {operation.parameters.length > 0 && (
        <>
          <h4>Parameters</h4>
          <Fields
            rows={operation.parameters.map((parameter) => [parameter.name, parameter.schema, parameter.required, `in the ${parameter.in}`])}
            spec={spec}
          />
        </>
      )}
      {operation.body && (
        <Folded title="Body">
          <Type schema={operation.body} spec={spec} depth={0} />
        </Folded>
      )}
      <Folded title="Answers">
        {operation.answers.map((answer) => (
          <div key={`${answer.status} ${answer.kind}`} class="answer-kind">
            <p>
              <Badge state={answer.status} /> {answer.text} <code>{answer.kind}</code>
            </p>
            {answer.schema && <Type schema={answer.schema} spec={spec} depth={0} />}
          </div>
        ))}
      </Folded>
      <Folded title="Try it">
        <TryIt operation={operation} sample={sample} examples={values} />
      </Folded>
    </article>
  );
}

type Row = [name: string, schema: Schema, required: boolean, note: string];

/** The fields of a type; those of types within it when they are opened. */
function Type({ schema, spec, depth }: { schema: Schema; spec: Spec; depth: number }) {
  const [open, setOpen] = useState(depth === 0);
  const kinds = objectsOf(schema, spec);
  if (kinds.length === 0) return null;
  if (!open) {
    return (
      <button type="button" class="link" onClick={() => setOpen(true)}>
        show {kinds.map((kind) => kind.title ?? "fields").join(", ")}
      </button>
    );
  }
  return (
    <>
      {kinds.map((kind, index) => (
        <div key={kind.title ?? index} class="type">
          {kind.title && <p class="type-name">{kind.title}</p>}
          {kind.description && <Markdown text={kind.description} />}
          <Fields
            rows={Object.entries(kind.properties ?? {}).map(([name, inner]): Row => [name, inner, kind.required?.includes(name) ?? false, ""])}
            spec={spec}
            depth={depth + 1}
          />
        </div>
      ))}
    </>
  );
}

function Fields({ rows, spec, depth = 1 }: { rows: Row[]; spec: Spec; depth?: number }) {
  return (
    <dl class="fields">
      {rows.map(([name, schema, required, note]) => (
        <div key={name}>
          <dt>
            <code>{name}</code>
            {required && <span class="required">required</span>}
          </dt>
          <dd>
            <p>
              <code class="kind">{typeText(schema)}</code> {note}
            </p>
            {schema.description && <Markdown text={schema.description} />}
            <Type schema={schema} spec={spec} depth={depth} />
          </dd>
        </div>
      ))}
    </dl>
  );
}

/** The types with fields that a value may have. */
function objectsOf(schema: Schema, spec: Spec): Schema[] {
  if (schema.$ref) {
    const kind = spec.components.schemas[schema.$ref.split("/").at(-1)!];
    return kind ? objectsOf(kind, spec) : [];
  }
  if (schema.contentSchema) return objectsOf(schema.contentSchema, spec);
  if (schema.properties && Object.keys(schema.properties).length > 0) return [schema];
  const inner = [...(schema.anyOf ?? []), ...(schema.oneOf ?? []), ...(schema.items ? [schema.items] : [])];
  return inner.flatMap((kind) => objectsOf(kind, spec));
}
