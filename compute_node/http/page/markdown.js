// The little of Markdown that models write, as elements: text never becomes markup, and there are no links or pictures.

import { make } from "./dom.js";

const FENCE = /^\s{0,3}(```+|~~~+)/;
const HEADING = /^(#{1,6})\s+(.*)$/;
const BULLET = /^\s{0,6}[-*+]\s+(.*)$/;
const NUMBERED = /^\s{0,6}(\d{1,9})[.)]\s+(.*)$/;
const BARE_MARK = /^\s{0,6}(?:[-*+]|\d{1,9}[.)])\s*$/;
const QUOTE = /^\s{0,3}>\s?(.*)$/;
const RULE = /^\s{0,3}([-*_])(\s*\1){2,}\s*$/;
const INLINE = /(`+)(.+?)\1|\*\*(\S(?:.*?\S)?)\*\*|__(\S(?:.*?\S)?)__|\*(\S(?:.*?\S)?)\*|(?<![\w_])_(\S(?:.*?\S)?)_(?![\w_])/s;

/** Brings the children of `parent` to the text: those whose source is the same stay as they are. */
export function renderMarkdown(parent, text) {
  const blocks = blocksOf(text);
  let same = 0;
  while (same < blocks.length && parent.children[same]?.source === blocks[same].source) same += 1;
  while (parent.children.length > same) parent.lastElementChild.remove();
  for (const block of blocks.slice(same)) {
    const element = block.build();
    element.source = block.source;
    parent.append(element);
  }
}

/** Blocks, each with the lines it was made from and how its element is built. */
export function blocksOf(text) {
  const lines = text.replaceAll("\r\n", "\n").split("\n");
  const blocks = [];
  for (let start = 0; start < lines.length; ) {
    if (!lines[start].trim()) {
      start += 1;
      continue;
    }
    const [end, build] = blockAt(lines, start);
    blocks.push({ source: lines.slice(start, end).join("\n"), build });
    start = end;
  }
  return blocks;
}

function blockAt(lines, start) {
  const line = lines[start];
  const fence = FENCE.exec(line);
  if (fence) return fenced(lines, start, fence[1]);
  const heading = HEADING.exec(line);
  if (heading) return [start + 1, () => make(heading[1].length < 3 ? "h3" : "h4", {}, ...inline(heading[2]))];
  if (RULE.test(line)) return [start + 1, () => make("hr")];
  if (QUOTE.test(line)) return quoted(lines, start);
  if (BULLET.test(line)) return listed(lines, start, BULLET, () => make("ul"), 1);
  const number = NUMBERED.exec(line);
  if (number) return listed(lines, start, NUMBERED, () => make("ol", { start: number[1] }), 2);
  return paragraph(lines, start);
}

function fenced(lines, start, fence) {
  let end = start + 1;
  while (end < lines.length && !lines[end].trim().startsWith(fence)) end += 1;
  const code = lines.slice(start + 1, end).join("\n");
  return [Math.min(end + 1, lines.length), () => make("pre", { tabindex: "0" }, make("code", {}, code))];
}

function quoted(lines, start) {
  const end = endOf(lines, start, (line) => QUOTE.test(line));
  const text = lines.slice(start, end).map((line) => QUOTE.exec(line)[1]).join("\n");
  return [end, () => make("blockquote", {}, ...inline(text))];
}

function listed(lines, start, pattern, makeList, group) {
  // A line of an item may go on, indented, in the next ones; and an item's mark comes before its text does.
  const end = endOf(lines, start, (line) => pattern.test(line) || BARE_MARK.test(line) || /^\s{2,}\S/.test(line));
  const items = [];
  for (const line of lines.slice(start, end)) {
    const item = pattern.exec(line);
    if (item) items.push(item[group]);
    else if (BARE_MARK.test(line)) items.push("");
    else items[items.length - 1] += ` ${line.trim()}`;
  }
  return [
    end,
    () => {
      const list = makeList();
      list.append(...items.map((item) => make("li", {}, ...inline(item))));
      return list;
    },
  ];
}

function paragraph(lines, start) {
  const begins = (line) => [FENCE, HEADING, BULLET, NUMBERED, QUOTE, RULE].some((pattern) => pattern.test(line));
  const end = endOf(lines, start, (line) => line.trim() && !begins(line));
  return [end, () => make("p", {}, ...inline(lines.slice(start, end).join("\n")))];
}

function endOf(lines, start, belongs) {
  let end = start + 1;
  while (end < lines.length && belongs(lines[end])) end += 1;
  return end;
}

function inline(text) {
  const parts = [];
  for (let found = INLINE.exec(text); found; found = INLINE.exec(text)) {
    parts.push(text.slice(0, found.index));
    if (found[2] !== undefined) parts.push(make("code", {}, found[2]));
    else if (found[3] ?? found[4]) parts.push(make("strong", {}, ...inline(found[3] ?? found[4])));
    else parts.push(make("em", {}, ...inline(found[5] ?? found[6])));
    text = text.slice(found.index + found[0].length);
  }
  parts.push(text);
  return parts.filter((part) => part !== "");
}
