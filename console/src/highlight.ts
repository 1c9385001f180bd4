/** Colours for code: strings, comments, numbers and keywords, of most languages alike. */

export interface Token {
  kind: "" | "string" | "comment" | "number" | "keyword" | "name";
  text: string;
}

const KEYWORDS = new Set(
  (
    "abstract and as assert async await bool boolean break case catch char class const continue def " +
    "default del delete do double elif else elsif end enum except export extends extern false False " +
    "final finally float fn for foreach from func function global go if impl implements import in " +
    "instanceof int interface is lambda let long loop match mod module mut namespace new nil None not " +
    "null of or package pass private protected pub public raise return self short signed sizeof static " +
    "struct super switch template then this throw throws trait true True try type typedef typeof union " +
    "unsigned until use using var void when where while with yield SELECT FROM WHERE JOIN GROUP ORDER " +
    "BY INSERT UPDATE DELETE CREATE TABLE AND OR NOT NULL VALUES INTO SET AS ON LIMIT echo fi done esac"
  ).split(" "),
);
const HASH = new Set(["", "py", "python", "sh", "bash", "shell", "console", "zsh", "rb", "ruby", "yaml", "yml", "toml", "r", "perl", "make", "dockerfile", "ini"]);
const SLASH = new Set(["", "js", "jsx", "ts", "tsx", "javascript", "typescript", "c", "cpp", "c++", "h", "cs", "csharp", "java", "go", "rust", "rs", "kotlin", "swift", "php", "scala", "dart", "json5", "css", "scss"]);
const DASHES = new Set(["sql", "lua", "haskell", "hs"]);
const LONGEST = 60_000;

const rules = new Map<string, RegExp>();

function ruleOf(language: string): RegExp {
  const known = rules.get(language);
  if (known) return known;
  const comments = ["<!--[^]*?(?:-->|$)"];
  if (HASH.has(language)) comments.push("(?<![\\w$&])#(?!\\w+;).*");
  if (SLASH.has(language)) comments.push("(?<!:)//.*", "/\\*[^]*?(?:\\*/|$)");
  if (DASHES.has(language)) comments.push("--.*");
  const string = '"""[^]*?(?:"""|$)|"(?:\\\\.|[^"\\\\\\n])*"?|\'(?:\\\\.|[^\'\\\\\\n])*\'|`(?:\\\\.|[^`\\\\])*`?';
  const rule = new RegExp(
    `(?<comment>${comments.join("|")})|(?<string>${string})|(?<number>\\b\\d[\\w.]*\\b)|(?<word>[A-Za-z_$][\\w$]*)(?<call>(?=\\())?`,
    "g",
  );
  rules.set(language, rule);
  return rule;
}

/** Return the tokens of a text; their texts together are the text. */
export function highlight(text: string, language: string): Token[] {
  if (text.length > LONGEST || language === "text" || language === "markdown") return [{ kind: "", text }];
  const tokens: Token[] = [];
  let place = 0;
  for (const match of text.matchAll(ruleOf(language.toLowerCase()))) {
    const kind = kindOf(match);
    if (kind === "") continue;
    if (match.index > place) tokens.push({ kind: "", text: text.slice(place, match.index) });
    tokens.push({ kind, text: match[0] });
    place = match.index + match[0].length;
  }
  if (place < text.length) tokens.push({ kind: "", text: text.slice(place) });
  return tokens;
}

function kindOf(match: RegExpMatchArray): Token["kind"] {
  const { comment, string, number, word, call } = match.groups!;
  if (comment !== undefined) return "comment";
  if (string !== undefined) return "string";
  if (number !== undefined) return "number";
  if (word !== undefined && KEYWORDS.has(word)) return "keyword";
  return word !== undefined && call !== undefined ? "name" : "";
}
