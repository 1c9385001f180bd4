/** Where a message is written, with its pictures. */

import { useEffect, useLayoutEffect, useRef, useState } from "preact/hooks";

import { useStore } from "../store";
import { Button } from "../ui";
import { draft, NO_DRAFT, send, stop } from "./use-conversation";

const TYPES = ["image/png", "image/jpeg", "image/gif", "image/webp"];
const MOST = 16;
const LARGEST = 20 * 2 ** 20;

interface Props {
  busy: boolean;
  /** Why pictures cannot be sent; null if they can. */
  blind: string | null;
}

export function Composer({ busy, blind }: Props) {
  const { text, images, replaces } = useStore(draft);
  const [problem, setProblem] = useState<string | null>(null);
  const [over, setOver] = useState(false);
  const area = useRef<HTMLTextAreaElement>(null);
  const picker = useRef<HTMLInputElement>(null);

  useLayoutEffect(() => {
    const field = area.current;
    if (!field) return;
    field.style.height = "auto";
    field.style.height = `${Math.min(field.scrollHeight, 240)}px`;
  }, [text]);
  useEffect(() => {
    if (replaces !== null) area.current?.focus();
  }, [replaces]);

  const attach = async (files: Iterable<File>) => {
    setProblem(null);
    for (const file of files) {
      if (!TYPES.includes(file.type)) setProblem(`${file.name || "This file"} is not a PNG, JPEG, GIF or WebP picture.`);
      else if (file.size > LARGEST) setProblem(`${file.name} is larger than 20 MB.`);
      else {
        const url = await dataUrl(file);
        const last = draft.get();
        if (last.images.length < MOST) draft.set({ ...last, images: [...last.images, url] });
        else setProblem(`A message has at most ${MOST} pictures.`);
      }
    }
  };
  const submit = () => {
    if (busy || (!text.trim() && images.length === 0)) return;
    if (send(draft.get())) draft.set(NO_DRAFT);
    area.current?.focus();
  };
  const press = (event: KeyboardEvent) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      submit();
    } else if (event.key === "Escape" && busy) stop();
    else if (event.key === "Escape" && replaces !== null) draft.set(NO_DRAFT);
  };
  const drop = (event: DragEvent) => {
    event.preventDefault();
    setOver(false);
    void attach(event.dataTransfer?.files ?? []);
  };
  const paste = (event: ClipboardEvent) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (files.length === 0) return;
    event.preventDefault();
    void attach(files);
  };

  return (
    <form
      class={`composer${over ? " over" : ""}`}
      onSubmit={(event) => (event.preventDefault(), submit())}
      onDragOver={(event) => (event.preventDefault(), setOver(true))}
      onDragLeave={() => setOver(false)}
      onDrop={drop}
    >
      {images.length > 0 && (
        <ul class="attached">
          {images.map((url, index) => (
            <li key={index}>
              <img src={url} alt={`Picture ${index + 1}`} />
              <Button icon="close" bare kind="quiet" label={`Remove picture ${index + 1}`} onClick={() => draft.set({ ...draft.get(), images: images.filter((_, place) => place !== index) })} />
            </li>
          ))}
        </ul>
      )}
      {replaces !== null && (
        <p class="note">
          It replaces an earlier message and all that follows it. <Button kind="quiet" icon="close" label="Leave it as it was" onClick={() => draft.set(NO_DRAFT)} />
        </p>
      )}
      {images.length > 0 && blind && <p class="note">{blind}</p>}
      {problem && (
        <p class="error" role="alert">
          {problem}
        </p>
      )}
      <div class="row">
        <input ref={picker} type="file" class="hidden" tabIndex={-1} aria-hidden="true" accept={TYPES.join()} multiple onChange={(event) => (void attach(event.currentTarget.files ?? []), (event.currentTarget.value = ""))} />
        <Button icon="image" bare kind="quiet" label="Add a picture" onClick={() => picker.current?.click()} />
        <textarea
          ref={area}
          rows={1}
          aria-label="Message"
          placeholder="Write a message"
          title="Enter sends it, Shift+Enter begins a line"
          value={text}
          onInput={(event) => draft.set({ ...draft.get(), text: event.currentTarget.value })}
          onKeyDown={press}
          onPaste={paste}
        />
        {busy ? (
          <Button icon="stop" kind="primary" label="Stop" onClick={stop} />
        ) : (
          <Button type="submit" icon="send" kind="primary" label="Send" disabled={!text.trim() && images.length === 0} />
        )}
      </div>
    </form>
  );
}

function dataUrl(file: File): Promise<string> {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(String(reader.result));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
