// The live page of wanrt: plays fragmented MP4 as it is made, shows statistics, sends prompts.
"use strict";

const KEEP_SECONDS = 20; // of played video, before it is dropped from memory
const BEHIND_SECONDS = 1.5; // further behind the newest frame than this, playback jumps
const TARGET_SECONDS = 0.3; // how far behind it aims to be
const RETRY_MS = 1000;

const element = (id) => document.getElementById(id);
const video = element("video");

function notice(text) {
  element("notice").textContent = text;
}

function appended(buffer, bytes) {
  return new Promise((resolve, reject) => {
    buffer.addEventListener("updateend", resolve, { once: true });
    buffer.addEventListener("error", reject, { once: true });
    buffer.appendBuffer(bytes);
  });
}

function removed(buffer, end) {
  return new Promise((resolve) => {
    buffer.addEventListener("updateend", resolve, { once: true });
    buffer.remove(0, end);
  });
}

// Stay close to the newest frame: begin where the stream begins, jump when playback has fallen behind.
function follow() {
  const ranges = video.buffered;
  if (!ranges.length) return;
  const start = ranges.start(ranges.length - 1);
  const end = ranges.end(ranges.length - 1);
  if (video.currentTime < start || end - video.currentTime > BEHIND_SECONDS) {
    video.currentTime = Math.max(start, end - TARGET_SECONDS);
  }
  if (video.paused) video.play().catch(() => notice("press play"));
}

async function trim(buffer) {
  const old = video.currentTime - KEEP_SECONDS;
  if (video.buffered.length && video.buffered.start(0) < old - KEEP_SECONDS) await removed(buffer, old);
}

async function play() {
  const info = await (await fetch("info")).json();
  if (!info.codec) throw new Error("waiting for the first frame");
  if (!MediaSource.isTypeSupported(info.codec)) throw new Error(`this browser does not play ${info.codec}`);
  const source = new MediaSource();
  const opened = new Promise((resolve) => source.addEventListener("sourceopen", resolve, { once: true }));
  const address = URL.createObjectURL(source);
  video.src = address;
  await opened;
  URL.revokeObjectURL(address);
  const buffer = source.addSourceBuffer(info.codec);
  const reader = (await fetch("stream")).body.getReader();
  notice(`live, ${info.width}x${info.height} at ${info.fps} fps`);
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the stream has ended");
    await appended(buffer, value);
    await trim(buffer);
    follow();
  }
}

async function playForever() {
  for (;;) {
    try {
      await play();
    } catch (error) {
      notice(error.message);
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

function row(name, value) {
  const term = document.createElement("dt");
  const detail = document.createElement("dd");
  term.textContent = name;
  detail.textContent = typeof value === "object" && value !== null ? JSON.stringify(value) : String(value);
  return [term, detail];
}

async function showStats() {
  try {
    const stats = await (await fetch("stats")).json();
    element("stats").replaceChildren(...Object.entries(stats).flatMap(([name, value]) => row(name, value)));
  } catch {
    // the stream is over or not there yet; the notice says so
  }
  setTimeout(showStats, 500);
}

async function say(event) {
  event.preventDefault();
  const text = element("prompt").value.trim();
  if (!text) return;
  element("say").disabled = true;
  const entry = document.createElement("li");
  try {
    const body = JSON.stringify({ text, blend: Number(element("blend").value) });
    const headers = { "Content-Type": "application/json" };
    const answer = await (await fetch("say", { method: "POST", headers, body })).json();
    entry.textContent = answer.error ? `${text}: ${answer.error}` : `${text} (from chunk ${answer.chunk})`;
    if (!answer.error) element("prompt").value = "";
  } catch (error) {
    entry.textContent = `${text}: ${error.message}`;
  }
  element("said").prepend(entry);
  element("say").disabled = false;
}

element("form").addEventListener("submit", say);
element("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    element("form").requestSubmit();
  }
});
playForever();
showStats();
