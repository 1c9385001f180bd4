/**
 * Markdown as elements. The text of models is never HTML here: the parser's tokens become elements
 * one by one, HTML in the text is shown as text, and only links to known schemes are links.
 */

import { Lexer, type Token, type Tokens } from "marked";
import type { ComponentChildren } from "preact";
import { useRef } from "preact/hooks";

import { memo } from "./memo";

import { highlight } from "./highlight";
import { CopyButton } from "./ui";

const LINKS = /^(?:https?:|mailto:)/i;
const PICTURES = /^data:image\/(?:png|jpeg|gif|webp);base64,/i;
const LARGEST = 200_000;
const SMALLEST = 4_000;

export const Markdown = memo(function Markdown({ text }: { text: string }) {
  const last = useRef<Cut>({ text: "", ends: [] });
  const { ends } = (last.current = cut(text, last.current));
  return (
    <div class="markdown">
      {[0, ...ends].map((start, index) => (
        <Piece key={index} text={text.slice(start, ends[index])} />
      ))}
    </div>
  );
});

const Piece = memo(function Piece({ text }: { text: string }) {
  if (text.length > LARGEST) return <pre class="plain">{text}</pre>;
  return <div class="piece">{blocks(new Lexer({ gfm: true, breaks: true }).lex(text))}</div>;
});

interface Cut {
  text: string;
  /** Where the pieces end, but for the last one. */
  ends: number[];
}

/** Cut a text where a paragraph or a heading begins, so that of an answer that grows only its end is read again. */
function cut(text: string, last: Cut): Cut {
  const ends = text.startsWith(last.text) ? last.ends.slice() : [];
  const lines = /([^\n]*)(?:\n|$)/g;
  let start = (lines.lastIndex = ends.at(-1) ?? 0);
  let fence = "";
  let blank = false;
  while (lines.lastIndex < text.length) {
    const place = lines.lastIndex;
    const line = lines.exec(text)![1]!;
    const mark = /^\s*(`{3,}|~{3,})/.exec(line)?.[1] ?? "";
    if (!fence && blank && place - start > SMALLEST && /^[\p{L}#]/u.test(line)) ends.push((start = place));
    if (!fence) fence = mark;
    else if (mark.startsWith(fence)) fence = "";
    blank = !line.trim();
  }
  return { text, ends };
}

function blocks(tokens: Token[]): ComponentChildren[] {
  return tokens.map((token, index) => <Block key={index} token={token} />);
}

function Block({ token }: { token: Token }) {
  switch (token.type) {
    case "space":
    case "def":
      return null;
    case "heading": {
      const Tag = `h${Math.min(6, (token as Tokens.Heading).depth + 2)}` as "h3";
      return <Tag>{inline(token.tokens)}</Tag>;
    }
    case "paragraph":
      return <p>{inline(token.tokens)}</p>;
    case "code":
      return <Code text={token.text} language={(token.lang ?? "").split(/\s/)[0] ?? ""} />;
    case "blockquote":
      return <blockquote>{blocks(token.tokens ?? [])}</blockquote>;
    case "list":
      return <List list={token as Tokens.List} />;
    case "table":
      return <Table table={token as Tokens.Table} />;
    case "hr":
      return <hr />;
    case "text":
      return <>{token.tokens ? inline(token.tokens) : unescaped(token.text)}</>;
    default:
      return <p>{token.raw}</p>;
  }
}

function List({ list }: { list: Tokens.List }) {
  const items = list.items.map((item, index) => (
    <li key={index} class={item.task ? "task" : undefined}>
      {item.task && <input type="checkbox" checked={Boolean(item.checked)} disabled aria-label="done" />}
      {blocks(item.tokens.filter((token) => token.type !== "checkbox"))}
    </li>
  ));
  return list.ordered ? <ol start={Number(list.start) || 1}>{items}</ol> : <ul>{items}</ul>;
}

function Table({ table }: { table: Tokens.Table }) {
  const side = (index: number) => `to-${table.align[index] ?? "left"}`;
  return (
    <div class="scroll">
      <table>
        <thead>
          <tr>
            {table.header.map((cell, index) => (
              <th key={index} class={side(index)}>
                {inline(cell.tokens)}
              </th>
            ))}
          </tr>
        </thead>
        <tbody>
          {table.rows.map((row, place) => (
            <tr key={place}>
              {row.map((cell, index) => (
                <td key={index} class={side(index)}>
                  {inline(cell.tokens)}
                </td>
              ))}
            </tr>
          ))}
        </tbody>
      </table>
    </div>
  );
}

/** A block of code with its language and a button that copies it. */
export const Code = memo(function Code({ text, language }: { text: string; language: string }) {
  return (
    <div class="code">
      <div class="code-head">
        <span>{language || "text"}</span>
        <CopyButton text={() => text} />
      </div>
      <pre tabIndex={0}>
        <code>
          {highlight(text, language).map((token, index) =>
            token.kind ? (
              <span key={index} class={`t-${token.kind}`}>
                {token.text}
              </span>
            ) : (
              token.text
            ),
          )}
        </code>
      </pre>
    </div>
  );
});

function inline(tokens: Token[] | undefined): ComponentChildren[] {
  return (tokens ?? []).map((token, index) => <Inline key={index} token={token} />);
}

function Inline({ token }: { token: Token }) {
  switch (token.type) {
    case "strong":
      return <strong>{inline(token.tokens)}</strong>;
    case "em":
      return <em>{inline(token.tokens)}</em>;
    case "del":
      return <del>{inline(token.tokens)}</del>;
    case "codespan":
      return <code>{token.text}</code>;
    case "br":
      return <br />;
    case "link":
      return <Link href={token.href}>{inline(token.tokens)}</Link>;
    case "image":
      if (PICTURES.test(token.href)) return <img src={token.href} alt={token.text} />;
      return <Link href={token.href}>{`[picture: ${token.text || token.href}]`}</Link>;
    case "text":
    case "escape":
      return <>{"tokens" in token && token.tokens ? inline(token.tokens) : unescaped(token.text)}</>;
    default:
      return <>{token.raw}</>;
  }
}

function Link({ href, children }: { href: string; children: ComponentChildren }) {
  if (!LINKS.test(href)) return <>{children}</>;
  return (
    <a href={href} target="_blank" rel="noopener noreferrer nofollow">
      {children}
    </a>
  );
}

const ENTITIES: Record<string, string> = { "&lt;": "<", "&gt;": ">", "&amp;": "&", "&quot;": '"', "&#39;": "'" };

/** Undo the escaping of the parser, which writes for HTML. */
function unescaped(text: string): string {
  return text.replace(/&(?:lt|gt|amp|quot|#39);/g, (entity) => ENTITIES[entity] ?? entity);
}
