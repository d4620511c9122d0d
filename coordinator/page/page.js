// The status page: asks the coordinator for an overview again and again, and for the rest only when something has come.

import { Chart, even } from "./charts.js";
import { clock, count, duration, number } from "./format.js";

const EVERY = 700;
/** A hidden page asks less often. */
const HIDDEN_EVERY = 10000;
const PATIENCE = 5000;
/** Points that a curve is loaded with; when twice as many have come, it is loaded anew. */
const POINTS = 400;
/** Points that are drawn. */
const DRAWN_POINTS = 300;
const ROWS = 50;
const EVENTS = 50;
const LEDGER_ROWS = 12;
/** Steps that the speed is a mean of. */
const RECENT = 30;

const STATES = {
  gathering: ["gathering workers", "info"],
  running: ["running", "good"],
  regrouping: ["regrouping", "warn"],
  stopping: ["stopping", "warn"],
  finished: ["finished", "good"],
  stopped: ["stopped", "info"],
  failed: ["failed", "bad"],
};
const SEVERITY = {
  worker_lost: "bad", stalled: "bad", non_finite: "bad", checkpoint_failed: "bad", ledger_inexact: "bad",
  newcomer_lost: "warn", regrouping: "warn", lagging: "warn", checkpoint_skipped: "warn", metric_missing: "warn",
  taken_over: "warn", formed: "good", keeps_up: "good",
};

const at = (id) => document.getElementById(id);
const set = (id, text) => {
  const element = at(id);
  if (element.textContent !== text) element.textContent = text;
};
function element(tag, text, name) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}

class Refused extends Error {}

async function ask(path) {
  const answer = await fetch(`/api/v1/${path}`, { signal: AbortSignal.timeout(PATIENCE), cache: "no-store" });
  if (answer.status === 401) throw new Refused(await answer.text());
  if (!answer.ok) throw new Error((await answer.text()).trim() || `status ${answer.status}`);
  return answer.json();
}

// --- curves ---------------------------------------------------------------------------------------------------------

const CHARTS = [
  { title: "Loss", series: ["loss", "cvr_loss"], smoothed: true, logs: true },
  { title: "In-batch accuracy", series: ["accuracy"], smoothed: true },
  { title: "Learning rate", series: ["learning_rate"], logs: true },
  { title: "Gradient norm", series: ["gradient_norm"], smoothed: true, logs: true },
  { title: "Throughput", unit: "users a second", series: ["users_per_second"], smoothed: true },
];
const NAMES = { loss: "whole", cvr_loss: "conversion" };
/** Metrics of evaluations that are drawn, the first of these that there are. */
const DRAWN = [/^recall@10$/, /^ndcg@10$/, /^mrr$/, /^recall@/, /^ndcg@/, /^hr@/, /^cvr\.auc$/];
const DRAWN_MOST = 3;

function look(step) {
  for (const chart of [...charts, evaluated]) chart.look(step);
  if (step === null) {
    set("read", drawn.last.length ? `${count(drawn.last.length)} points` : "");
    return;
  }
  const place = drawn.last.indexOf(step);
  const first = place >= 0 ? drawn.first[place] : step;
  set("read", first === step ? `step ${count(step)}` : `steps ${count(first)} to ${count(step)}: mean and extent`);
}

const charts = CHARTS.map((options) => new Chart(options, look));
const evaluated = new Chart({ title: "Evaluation", unit: "valid", dots: true, nothing: "No evaluation yet" }, look);
at("charts").append(...[...charts, evaluated].map((chart) => chart.root));

let curves = { first: [], last: [], series: {} };
let drawn = curves;
let stepsPerEpoch = 0;

const range = () => Number(document.querySelector("input[name=range]:checked").value);

async function loadCurves(newest) {
  const from = range() > 0 ? Math.max(0, newest - range() + 1) : 0;
  curves = await ask(`steps?from=${from}&to=${newest}&points=${POINTS}`);
}

/**
 * Brings the curves up to `newest`; asks for what is new, unless it is much. There may be later steps, of a past that the
 * job does not go on from, until it begins.
 */
async function followCurves(newest) {
  const known = curves.last.length ? curves.last[curves.last.length - 1] : 0;
  if (newest === known) return;
  const grown = curves.last.length > 2 * POINTS || newest < known || newest - known > POINTS;
  if (grown || !curves.last.length || range() > 0) {
    await loadCurves(newest);
  } else {
    append(await ask(`steps?from=${known + 1}&to=${newest}&points=${POINTS}`));
  }
  drawCurves();
}

function append(more) {
  const before = curves.last.length;
  const fill = () => new Array(before).fill(null);
  for (const [name, column] of Object.entries(more.series)) {
    const known = (curves.series[name] ??= { mean: fill() });
    if ((known.min || column.min) && !known.min) Object.assign(known, { min: [...known.mean], max: [...known.mean] });
    known.mean.push(...column.mean);
    known.min?.push(...(column.min ?? column.mean));
    known.max?.push(...(column.max ?? column.mean));
  }
  curves.first.push(...more.first);
  curves.last.push(...more.last);
}

function drawCurves() {
  const marks = [];
  const last = curves.last[curves.last.length - 1] ?? 0;
  if (stepsPerEpoch > 0 && last / stepsPerEpoch <= 40) {
    for (let mark = stepsPerEpoch; mark < last; mark += stepsPerEpoch) marks.push(mark);
  }
  const log = at("log").checked;
  drawn = even(curves, DRAWN_POINTS);
  charts.forEach((chart, place) => {
    const names = CHARTS[place].series.filter((name) => drawn.series[name]);
    chart.set(drawn.last, names.map((name) => ({ name: NAMES[name] ?? name, ...drawn.series[name] })), { log, marks });
  });
  look(null);
}

// --- evaluations ----------------------------------------------------------------------------------------------------

function drawEvaluations(all) {
  const valid = all.filter((one) => one.split === "valid");
  const metrics = [...new Set(all.flatMap((one) => Object.keys(one.metrics)))];
  const chosen = [];
  for (const pattern of DRAWN) {
    const found = metrics.find((name) => pattern.test(name) && !chosen.includes(name));
    if (found && chosen.length < DRAWN_MOST) chosen.push(found);
  }
  const lines = chosen.map((name) => ({ name, mean: valid.map((one) => one.metrics[name] ?? null) }));
  evaluated.set(valid.map((one) => one.step), valid.length ? lines : []);

  set("evaluations-count", all.length ? `${count(all.length)}, newest first` : "none yet");
  const ordered = [...chosen, ...metrics.filter((name) => !chosen.includes(name))];
  const head = element("tr");
  for (const [name, kind] of [["Step", "number"], ["Epoch", "number"], ["Split", ""], ["Users", "number"], ...ordered.map((name) => [name, "number"])]) {
    const cell = element("th", name, kind);
    cell.scope = "col";
    head.append(cell);
  }
  const rows = [];
  const cells = (texts, kinds = []) => {
    const row = element("tr");
    row.append(...texts.map((text, place) => element("td", text, place === 2 ? "" : "number")));
    kinds.forEach((kind) => row.classList.add(kind));
    return row;
  };
  for (const one of all.slice(-100).reverse()) {
    const values = (metrics) => ordered.map((name) => (name in metrics ? metrics[name].toFixed(4) : ""));
    rows.push(cells([count(one.step), String(one.epoch + 1), one.split, count(one.users), ...values(one.metrics)]));
    for (const other of one.comparisons ?? []) {
      rows.push(cells(["", "", other.name.replaceAll("_", " "), "", ...values(other.metrics)], ["other"]));
    }
  }
  at("evaluations").tHead.replaceChildren(...(all.length ? [head] : []));
  at("evaluations").tBodies[0].replaceChildren(...rows);
}

// --- ranks ----------------------------------------------------------------------------------------------------------

let offset = 0;

async function showRanks() {
  const answer = await ask(`workers?show=${at("show").value}&order=${at("order").value}&offset=${offset}&limit=${ROWS}`);
  if (offset >= answer.total && offset > 0) {
    offset = Math.floor(Math.max(0, answer.total - 1) / ROWS) * ROWS;
    return showRanks();
  }
  const rows = answer.workers.map((worker) => {
    const row = element("tr", undefined, worker.left ? "gone" : "");
    row.dataset.worker = worker.worker;
    row.dataset.rank = worker.rank ?? "";
    row.dataset.liveness = worker.liveness;
    const state = element("td");
    state.append(element("span", worker.liveness, `mark ${worker.liveness}`));
    const phase = element("td", worker.left && worker.phase === worker.liveness ? "–" : worker.phase.replaceAll("_", " "));
    if (!worker.left && worker.seconds_in_phase >= 1) phase.append(element("span", ` ${duration(worker.seconds_in_phase)}`, "muted"));
    const host = element("td", worker.host, "mono");
    host.title = `pid ${worker.pid}`;
    row.append(
      element("td", worker.rank === null ? "–" : String(worker.rank), "number"),
      state,
      phase,
      element("td", count(worker.step), "number"),
      element("td", worker.work_ratio ? `${worker.work_ratio.toFixed(2)}×` : "–", "number"),
      element("td", `${duration(worker.seconds_since_heartbeat)} ago`, "number"),
      host,
      element("td", worker.device),
      element("td", String(worker.worker), "number"),
    );
    return row;
  });
  at("ranks").tBodies[0].replaceChildren(...rows);
  const several = answer.total > ROWS;
  at("pages").hidden = !several;
  if (several) {
    set("page", `${count(offset + 1)} to ${count(offset + rows.length)} of ${count(answer.total)}`);
    at("back").disabled = offset === 0;
    at("next").disabled = offset + ROWS >= answer.total;
  }
}

// --- events ---------------------------------------------------------------------------------------------------------

let events = [];

function drawEvents(total) {
  const rows = events.map((event) => {
    const row = element("li", undefined, SEVERITY[event.event] ?? "");
    row.dataset.event = event.event;
    row.dataset.number = event.number;
    const time = element("time", clock(event.time));
    time.dateTime = new Date(event.time * 1000).toISOString();
    time.title = `generation ${event.generation}`;
    row.append(time, element("p", event.text));
    return row;
  });
  at("events").replaceChildren(...rows);
  set("events-count", total ? `${count(total)}, newest first` : "none yet");
  const oldest = events.length ? events[events.length - 1].number : 1;
  at("older").hidden = oldest <= 1;
}

async function followEvents(total) {
  const newest = events.length ? events[0].number : 0;
  if (newest === total) return;
  if (total < newest) events = [];
  const answer = await ask(`events?after=${total < newest ? 0 : newest}&limit=500`);
  const fresh = newest === 0 || total < newest ? answer.events.slice(0, EVENTS) : answer.events;
  events = [...fresh, ...events].slice(0, 1000);
  drawEvents(answer.total);
}

// --- ledger and configuration ---------------------------------------------------------------------------------------

function drawLedger(ledger) {
  const exact = element("span", ledger.exact ? "exact" : "not exact", ledger.exact ? "yes" : "no");
  at("ledger-exact").replaceChildren(exact);
  set("ledger-users", count(ledger.epochs[0]?.users ?? 0));
  const rows = ledger.epochs.slice(-LEDGER_ROWS).reverse().map((epoch) => {
    const row = element("tr");
    const share = element("div", undefined, "share");
    const part = (100 * epoch.seen) / Math.max(epoch.users, 1);
    share.setAttribute("role", "img");
    share.ariaLabel = `${part.toFixed(0)} % of the users`;
    share.append(element("div"));
    share.firstChild.style.width = `${part}%`;
    const cell = element("td");
    cell.append(share);
    row.append(
      element("td", String(epoch.epoch + 1), "number"),
      cell,
      element("td", count(epoch.seen), "number"),
      element("td", count(epoch.repeated), epoch.repeated ? "number no" : "number"),
      element("td", count(epoch.unknown), epoch.unknown ? "number no" : "number"),
    );
    return row;
  });
  at("ledger").tBodies[0].replaceChildren(...rows);
}

function leaves(value, path = []) {
  if (value === null || typeof value !== "object" || Array.isArray(value)) return [[path.join("."), value]];
  return Object.entries(value).flatMap(([name, inner]) => leaves(inner, [...path, name]));
}

function drawConfig(config) {
  const sections = Object.entries(config).map(([name, values]) => {
    const details = element("details");
    const list = element("dl");
    for (const [key, value] of leaves(values)) {
      const text = value === null ? "not set" : typeof value === "string" ? value : JSON.stringify(value);
      const pair = [element("dt", key), element("dd", text)];
      pair.forEach((part) => (part.dataset.key = `${name}.${key}`.toLowerCase()));
      list.append(...pair);
    }
    details.append(element("summary", name), list);
    return details;
  });
  at("config").replaceChildren(...sections);
}

function find(text) {
  const wanted = text.trim().toLowerCase();
  for (const details of at("config").children) {
    let found = false;
    for (const part of details.querySelectorAll("[data-key]")) {
      const hit = part.dataset.key.includes(wanted);
      part.hidden = !hit;
      found ||= hit;
    }
    details.hidden = !found;
    details.open = wanted !== "" && found;
  }
}

// --- at a glance ----------------------------------------------------------------------------------------------------

function speed() {
  const seconds = curves.series.seconds?.mean.slice(-RECENT).filter((value) => value !== null) ?? [];
  return seconds.length ? seconds.reduce((sum, value) => sum + value, 0) / seconds.length : null;
}

function glance(job) {
  const [state, tone] = STATES[job.state] ?? [job.state, ""];
  set("name", job.name);
  document.title = `${job.last_step && job.total_steps ? `${Math.floor((100 * job.last_step.step) / job.total_steps)} % ` : ""}${job.name} – ${state}`;
  document.body.dataset.state = job.state;
  const task = job.task.kind === "train" ? "trains on" : "evaluates";
  set("about", `${task} ${job.dataset.name}: ${count(job.dataset.train_users)} users, ${count(job.dataset.items)} items, ${count(job.dataset.interactions)} interactions`);
  set("state", state);
  at("state").className = `pill ${tone}`;

  const step = job.last_step;
  const done = step && job.total_steps ? Math.min(100, (100 * step.step) / job.total_steps) : 0;
  at("done").style.width = `${done}%`;
  at("track").setAttribute("aria-valuenow", done.toFixed(0));
  set("step", step ? count(step.step) : "–");
  at("step").dataset.step = step?.step ?? 0;
  set("step-more", step ? `of ${count(job.total_steps)} · epoch ${step.epoch + 1}` : job.total_steps ? `of ${count(job.total_steps)}` : " ");
  set("loss", step ? number(step.loss) : "–");
  set("loss-more", step ? `accuracy ${number(step.accuracy, 3)}` : " ");
  const pace = speed();
  const rate = curves.series.users_per_second?.mean.slice(-RECENT).filter((value) => value !== null) ?? [];
  set("speed", rate.length ? number(rate.reduce((sum, value) => sum + value, 0) / rate.length, 3) : "–");
  set("speed-more", pace === null ? " " : `${duration(pace)} a step`);
  const over = ["finished", "stopped", "failed"].includes(job.state);
  set("left", over ? "–" : pace === null ? "–" : duration(pace * Math.max(0, job.total_steps - (step?.step ?? 0))));
  set("left-more", `${duration(job.seconds)} so far`);
  set("best", job.best ? job.best.value.toFixed(4) : "–");
  set("best-more", job.best ? `${job.best.metric} · step ${count(job.best.step)}` : job.last_checkpoint !== null ? `checkpoint at ${count(job.last_checkpoint)}` : " ");
  const { alive, silent, lost, left } = job.workers;
  set("workers-now", `${alive} of ${job.wanted_workers}`);
  at("workers-now").dataset.alive = alive;
  const phases = Object.entries(job.workers.phases).sort((a, b) => b[1] - a[1]);
  set("workers-more", [silent && `${count(silent)} silent`, lost && `${count(lost)} lost`].filter(Boolean).join(" · ") || `generation ${job.generation}`);
  const busy = phases.slice(0, 4).map(([name, number]) => `${count(number)} ${name.replaceAll("_", " ")}`);
  set("ranks-count", [`generation ${job.generation}:`, ...busy, lost && `${count(lost)} lost`, left && `${count(left)} left`].filter(Boolean).join(", ").replace(":,", ":"));

  if (job.stall && !over) alarm(job.stall, "bad");
  else if (job.state === "finished") alarm("The job has finished. Its coordinator goes now, and this page stays as it is.", "info");
  else if (job.cause) alarm(job.cause, job.state === "failed" ? "bad" : "warn");
  else alarm(null);
}

function alarm(text, tone = "warn") {
  at("alert").hidden = text === null;
  at("alert").className = `alert ${tone}`;
  set("alert", text ?? "");
}

// --- the loop -------------------------------------------------------------------------------------------------------

let job = null;
let answered = null;
let known = { evaluations: -1, ledger: "" };
let configured = false;

async function lookAgain() {
  job = await ask("overview");
  answered = Date.now();
  stepsPerEpoch = job.steps_per_epoch;
  const newest = Math.max(job.last_step?.step ?? 0, 0);
  const tasks = [showRanks(), followEvents(job.counts.events)];
  if (job.counts.steps > 0) tasks.push(followCurves(newest));
  if (job.counts.evaluations !== known.evaluations) {
    known.evaluations = job.counts.evaluations;
    tasks.push(ask("evaluations").then((answer) => drawEvaluations(answer.evaluations)));
  }
  const ledger = JSON.stringify(job.ledger);
  if (ledger !== known.ledger) {
    known.ledger = ledger;
    tasks.push(ask("ledger").then(drawLedger));
  }
  if (!configured) tasks.push(ask("config").then((config) => (drawConfig(config), (configured = true))));
  glance(job);
  await Promise.all(tasks);
  glance(job);
}

function silence(error) {
  if (error instanceof Refused) {
    alarm("The token is not taken any more: another run may serve at this address. Open the page with this run's token.", "bad");
    return;
  }
  const since = answered ? ` since ${clock(answered / 1000)}` : "";
  const ended = job && ["finished", "stopped", "failed"].includes(job.state);
  document.body.dataset.away = "yes";
  if (ended) {
    alarm(`The job has ended (${job.state}), and its coordinator with it. This is how it was last seen.`, job.state === "failed" ? "bad" : "info");
  } else {
    alarm(`No answer from the coordinator${since}. The job has ended, or its machine cannot be reached; \`learn-launch status\` shows which.`, "warn");
  }
}

function pulse() {
  if (answered === null) return;
  const age = Math.round((Date.now() - answered) / 1000);
  set("pulse", age <= 2 ? "live" : `${duration(age)} ago`);
}

let timer = null;
let asking = false;

async function loop() {
  clearTimeout(timer);
  if (asking) return;
  asking = true;
  try {
    await lookAgain();
    delete document.body.dataset.away;
  } catch (error) {
    silence(error);
  } finally {
    asking = false;
    pulse();
    timer = setTimeout(loop, document.hidden ? HIDDEN_EVERY : EVERY);
  }
}

/** What a person does to the page: shown at once. */
function redo(action) {
  action().catch(silence);
}

document.getElementById("range").addEventListener("change", () => {
  redo(async () => {
    await loadCurves(job?.last_step?.step ?? 0);
    drawCurves();
  });
});
at("log").addEventListener("change", drawCurves);
for (const id of ["show", "order"]) {
  at(id).addEventListener("change", () => {
    offset = 0;
    redo(showRanks);
  });
}
at("back").addEventListener("click", () => ((offset = Math.max(0, offset - ROWS)), redo(showRanks)));
at("next").addEventListener("click", () => ((offset += ROWS), redo(showRanks)));
at("older").addEventListener("click", () => {
  redo(async () => {
    const oldest = events[events.length - 1].number;
    const answer = await ask(`events?before=${oldest}&limit=${EVENTS}`);
    // older ones are in the run's file alone
    events = [...events, ...answer.events];
    drawEvents(answer.total);
    if (!answer.events.length) at("older").hidden = true;
  });
});
at("find").addEventListener("input", (event) => find(event.target.value));
document.addEventListener("visibilitychange", () => document.hidden || loop());
setInterval(pulse, 1000);

// the cookie has it now: neither the history nor a copied address is to hold it
if (location.search) history.replaceState(null, "", location.pathname);
loop();
