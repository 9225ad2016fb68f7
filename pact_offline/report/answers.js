"use strict";
// Searches the answers in #answers-data, two models side by side. Whatever comes from a prompt, an
// answer or a name becomes a text node: it is never read as HTML.
(() => {
  const PAGE = 20; // prompts
  const LONG = 5000; // characters of a text that are laid out at once: a megabyte takes seconds
  const LINES = 200; // and of these, lines
  const at = (id) => document.getElementById(id);
  const data = JSON.parse(at("answers-data").textContent);
  const [finder, found, list, pager] = ["finder", "found", "found-list", "pager"].map(at);
  const field = Object.fromEntries(
    ["text", "set", "run", "verdict", "beside", "differ"].map((name) => [name, at(`find-${name}`)]),
  );
  const keys = at("answer-keys").children;
  const NOT_GOOD = "bad";
  let matches = [];
  let page = 0;

  const element = (tag, className, ...children) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    made.append(...children);
    return made;
  };

  // A text of others, which may run from right to left.
  const quoted = (tag, ...children) => {
    const made = element(tag, "", ...children);
    made.dir = "auto";
    return made;
  };

  const answerOf = (run, prompt) => data.texts[data.answers[run][prompt]];
  const verdictsOf = (run, prompt) => data.verdicts[data.judged[run][prompt]];
  const wasAsked = (run, prompt) => data.answers[run][prompt] >= 0;
  const isBad = (verdicts) => verdicts.some(([, good]) => good === false);

  // What the fields say, as one object.
  const question = () => {
    const run = Number(field.run.value);
    const beside = field.beside.value === "" ? null : Number(field.beside.value);
    const text = field.text.value.trim();
    return {
      run,
      runs: beside === null || beside === run ? [run] : [run, beside],
      set: field.set.value === "" ? null : Number(field.set.value),
      verdict: field.verdict.value,
      differ: field.differ.value,
      pattern: text && new RegExp(text.replace(/[.*+?^${}()|[\]\\/]/g, "\\$&"), "giu"),
    };
  };

  const has = (pattern, text) => {
    pattern.lastIndex = 0;
    return pattern.test(text);
  };

  const differs = (runs, prompt, numbers) =>
    runs.length === 2 &&
    runs.every((run) => wasAsked(run, prompt)) &&
    numbers[runs[0]][prompt] !== numbers[runs[1]][prompt];

  const isFound = (asked, prompt) => {
    const [set, text] = data.prompts[prompt];
    if (asked.set !== null && set !== asked.set) return false;
    const shown = asked.runs.filter((run) => wasAsked(run, prompt));
    if (!shown.length) return false;
    if (asked.verdict) {
      if (!wasAsked(asked.run, prompt)) return false;
      const verdicts = verdictsOf(asked.run, prompt);
      const fits =
        asked.verdict === NOT_GOOD
          ? isBad(verdicts)
          : verdicts.some(([word]) => `=${word}` === asked.verdict);
      if (!fits) return false;
    }
    if (asked.differ === "verdict" && !differs(asked.runs, prompt, data.judged)) return false;
    if (asked.differ === "text" && !differs(asked.runs, prompt, data.answers)) return false;
    return (
      !asked.pattern ||
      has(asked.pattern, text) ||
      shown.some((run) => has(asked.pattern, answerOf(run, prompt)))
    );
  };

  // A text with what was searched for marked in it.
  const marked = (text, pattern) => {
    const parts = new DocumentFragment(); // of any number, where arguments are not
    let end = 0;
    for (const hit of pattern ? text.matchAll(pattern) : []) {
      parts.append(text.slice(end, hit.index), element("mark", "", hit[0]));
      end = hit.index + hit[0].length;
    }
    parts.append(text.slice(end));
    return parts;
  };

  // The same; of a long text the rest waits in a fold, which says how often it has what is searched.
  const shownOf = (text, pattern) => {
    const cut = text.split("\n", LINES).join("\n").slice(0, LONG);
    const start = cut.length < text.length ? cut.replace(/[\ud800-\udbff]$/, "") : cut;
    const rest = text.slice(start.length);
    const parts = marked(start, pattern);
    if (!rest) return parts;
    const hits = pattern ? [...rest.matchAll(pattern)].length : 0;
    const more = `${rest.length.toLocaleString("en")} more characters`;
    const says = hits ? `${more}, with ${hits.toLocaleString("en")} of what is searched` : more;
    parts.append(element("details", "", element("summary", "", says), marked(rest, pattern)));
    return parts;
  };

  const tag = ([word, good]) => {
    const looks = good === null ? "tag" : good ? "tag good" : "tag bad";
    return element("span", looks, good === false ? `! ${word}` : word);
  };

  const answerBox = (run, prompt, pattern) => {
    const name = element("span", "name", keys[run].cloneNode(true), ` ${data.runs[run]}`);
    if (!wasAsked(run, prompt)) {
      return element("div", "answer", element("p", "who", name), "was not asked");
    }
    const tags = element("span", "tags", ...verdictsOf(run, prompt).map(tag));
    const text = answerOf(run, prompt);
    const quote = quoted("blockquote", text ? shownOf(text, pattern) : "(empty)");
    return element("div", "answer", element("p", "who", name, " ", tags), quote);
  };

  const article = (asked, prompt) => {
    const [set, text, expected] = data.prompts[prompt];
    const what = element("small", "", `${data.sets[set]} prompt`);
    if (expected !== null) what.append("; right answer: ", quoted("bdi", expected));
    if (differs(asked.runs, prompt, data.judged)) {
      what.append(element("span", "tag", "verdicts differ"));
    } else if (differs(asked.runs, prompt, data.answers)) {
      what.append(element("span", "tag", "texts differ"));
    }
    return element(
      "article",
      "sample",
      element("h3", "", what, quoted("span", shownOf(text, asked.pattern))),
      element("div", "answers", ...asked.runs.map((run) => answerBox(run, prompt, asked.pattern))),
    );
  };

  // "sft: 12 answered, 68 refused", of what was found.
  const tally = (run) => {
    const counts = new Map();
    for (const prompt of matches) {
      if (!wasAsked(run, prompt)) continue;
      for (const [word] of verdictsOf(run, prompt)) counts.set(word, (counts.get(word) ?? 0) + 1);
    }
    const words = [...counts].sort().map(([word, count]) => `${count} ${word}`);
    return `${data.runs[run]}: ${words.join(", ") || "not asked"}`;
  };

  const show = () => {
    const asked = question();
    const pages = Math.max(1, Math.ceil(matches.length / PAGE));
    const here = matches.slice(page * PAGE, (page + 1) * PAGE);
    found.textContent = [
      `${matches.length} of ${data.prompts.length} prompts`,
      ...(matches.length ? asked.runs.map(tally) : []),
    ].join(" · ");
    list.replaceChildren(...here.map((prompt) => article(asked, prompt)));
    pager.hidden = pages === 1;
    at("page-place").textContent = `Page ${page + 1} of ${pages}`;
    at("page-back").setAttribute("aria-disabled", String(page === 0));
    at("page-on").setAttribute("aria-disabled", String(page === pages - 1));
  };

  const find = () => {
    const asked = question();
    matches = data.prompts.map((_, prompt) => prompt).filter((prompt) => isFound(asked, prompt));
    page = 0;
    show();
  };

  const turn = (by) => {
    if (page + by < 0 || (page + by) * PAGE >= matches.length) return;
    page += by;
    show();
    list.focus({ preventScroll: true });
    list.scrollIntoView();
  };

  data.sets.forEach((name, set) => field.set.append(new Option(name, set)));
  data.runs.forEach((name, run) => {
    field.run.append(new Option(name, run, run === 1, run === 1)); // the first after the reference
    const isBeside = run === 0 && data.runs.length > 1;
    field.beside.append(new Option(name, run, isBeside, isBeside));
  });
  const words = new Set(data.verdicts.flat().map(([word]) => word));
  [...words].sort().forEach((word) => field.verdict.append(new Option(word, `=${word}`)));
  if (data.verdicts.some(isBad)) {
    field.verdict.append(new Option("not as it should be", NOT_GOOD));
  }

  finder.addEventListener("input", find);
  finder.addEventListener("submit", (event) => event.preventDefault());
  finder.addEventListener("reset", () => setTimeout(find)); // the fields are cleared after this
  at("page-back").addEventListener("click", () => turn(-1));
  at("page-on").addEventListener("click", () => turn(1));
  at("answers-note").hidden = true;
  finder.hidden = false;
  find();
})();
