/** Components that are rendered again only when a property has changed. */

import { Component, type FunctionComponent, h, type JSX } from "preact";

export function memo<P extends object>(inner: FunctionComponent<P>): FunctionComponent<P> {
  class Memo extends Component<P> {
    override shouldComponentUpdate(next: Record<string, unknown>): boolean {
      const last = this.props as Record<string, unknown>;
      return Object.keys(next).some((name) => next[name] !== last[name]);
    }

    render(): JSX.Element {
      return h(inner as FunctionComponent<object>, this.props) as JSX.Element;
    }
  }
  return Memo as unknown as FunctionComponent<P>;
}
