/** The frame around every page: navigation, theme, key. */

import type { ComponentType } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";

import { currentKey } from "./api";
import { Docs } from "./pages/docs";
import { Keys } from "./pages/keys";
import { Models } from "./pages/models";
import { Now } from "./pages/now";
import { Requests } from "./pages/requests";
import { Speed } from "./pages/speed";
import { Usage } from "./pages/usage";
import { Playground } from "./playground/playground";
import { draft, NO_DRAFT } from "./playground/use-conversation";
import { route } from "./route";
import { check, enter, session } from "./session";
import { useStore } from "./store";
import { theme, type Theme } from "./theme";
import { Button, Field, Icon, type IconName, Loading, Problem } from "./ui";

interface Page {
  name: string;
  title: string;
  icon: IconName;
  view: ComponentType;
}

const PAGES: Page[] = [
  { name: "now", title: "Now", icon: "now", view: Now },
  { name: "playground", title: "Playground", icon: "chat", view: Playground },
  { name: "requests", title: "Requests", icon: "requests", view: Requests },
  { name: "usage", title: "Usage", icon: "usage", view: Usage },
  { name: "speed", title: "Speed", icon: "speed", view: Speed },
  { name: "models", title: "Models", icon: "models", view: Models },
  { name: "keys", title: "Keys", icon: "key", view: Keys },
];
const DOCS: Page = { name: "docs", title: "API", icon: "docs", view: Docs };
const isDocs = location.pathname === "/docs";

function currentPage(parts: string[]): Page {
  if (isDocs) return DOCS;
  return PAGES.find((page) => page.name === parts[0]) ?? PAGES[0]!;
}

export function App() {
  const page = currentPage(useStore(route));
  const { phase, problem } = useStore(session);
  useEffect(() => void check(), []);
  useEffect(() => {
    document.title = `${page.title} – Headrace`;
  }, [page]);
  const View = page.view;
  return (
    <div class="frame">
      <a class="skip" href="#content" onClick={(event) => { event.preventDefault(); document.getElementById("content")?.focus(); }}>
        Skip to the content
      </a>
      <Side page={page} />
      <main id="content" tabIndex={-1} class={`page-${page.name}`}>
        {phase === "checking" && <Loading />}
        {phase === "unreachable" && <Problem text={problem ?? ""} again={() => void check()} />}
        {phase === "locked" && <KeyForm problem={problem} />}
        {phase === "open" && <View />}
      </main>
    </div>
  );
}

function Side({ page }: { page: Page }) {
  const { phase } = useStore(session);
  return (
    <nav class="side" aria-label="Pages">
      <a class="brand" href="/#/now">
        <img src="/console/icon.svg" alt="" width="22" height="22" />
        <span>Headrace</span>
      </a>
      <ul>
        {PAGES.map((entry) => (
          <li key={entry.name}>
            <NavLink page={entry} current={page === entry} href={`${isDocs ? "/" : ""}#/${entry.name}`} />
          </li>
        ))}
        <li>
          <NavLink page={DOCS} current={page === DOCS} href="/docs" />
        </li>
      </ul>
      <div class="foot">
        <ThemeButton />
        {phase === "open" && currentKey() !== null && (
          <Button kind="quiet" icon="key" label="Forget the key" onClick={forget} />
        )}
      </div>
    </nav>
  );
}

/** Forget the key, and what was written with it and not sent. */
function forget(): void {
  draft.set(NO_DRAFT);
  void enter(null);
}

function NavLink({ page, current, href }: { page: Page; current: boolean; href: string }) {
  return (
    <a href={href} aria-current={current ? "page" : undefined}>
      <Icon name={page.icon} />
      <span>{page.title}</span>
    </a>
  );
}

const NEXT: Record<Theme, Theme> = { auto: "light", light: "dark", dark: "auto" };
const THEMES: Record<Theme, { icon: IconName; label: string }> = {
  auto: { icon: "auto", label: "Theme: system" },
  light: { icon: "sun", label: "Theme: light" },
  dark: { icon: "moon", label: "Theme: dark" },
};

function ThemeButton() {
  const value = useStore(theme);
  return <Button kind="quiet" {...THEMES[value]} onClick={() => theme.set(NEXT[value])} />;
}

function KeyForm({ problem }: { problem: string | null }) {
  const [value, setValue] = useState("");
  const place = useRef<HTMLInputElement>(null);
  useEffect(() => place.current?.focus(), []);
  const submit = (event: Event) => {
    event.preventDefault();
    if (value.trim()) void enter(value.trim());
  };
  return (
    <form class="key-form" onSubmit={submit}>
      <h1>This service needs a key</h1>
      <p>
        It is kept in this tab only, until the tab is closed. An admin key also shows requests and usage, and can load and
        unload models.
      </p>
      <Field label="API key">
        <input ref={place} type="password" autocomplete="off" spellcheck={false} value={value} onInput={(event) => setValue(event.currentTarget.value)} />
      </Field>
      {problem && (
        <p class="error" role="alert">
          {problem}
        </p>
      )}
      <Button type="submit" kind="primary" label="Continue" disabled={!value.trim()} />
    </form>
  );
}
