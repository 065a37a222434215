// Times, sizes and states for people.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

/** A number of bytes. */
export function size(bytes) {
  if (bytes === undefined || bytes === null) return "";
  if (typeof bytes === "string") return bytes.replace(/([0-9])([A-Z])/, "$1 $2");
  let at = 0;
  let value = bytes;
  while (value >= 1024 && at < UNITS.length - 1) [value, at] = [value / 1024, at + 1];
  return `${at > 0 && value < 10 ? value.toFixed(1) : Math.round(value)} ${UNITS[at]}`;
}

/** A length of time in seconds, in its largest units. */
export function span(seconds, units = 2) {
  const whole = Math.max(0, Math.floor(seconds));
  const parts = [[Math.floor(whole / 86400), "d"], [Math.floor(whole / 3600) % 24, "h"], [Math.floor(whole / 60) % 60, "min"], [whole % 60, "s"]];
  const first = parts.findIndex(([count]) => count > 0);
  if (first < 0) return "0 s";
  return parts.slice(first, first + units).filter(([count]) => count > 0).map(([count, unit]) => `${count} ${unit}`).join(" ");
}

/** A length of time in milliseconds. */
export function duration(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : ms < 60_000 ? `${(ms / 1000).toFixed(1)} s` : span(ms / 1000);
}

/** How long ago a time was. */
export function since(time, units) {
  return span((Date.now() - Date.parse(time)) / 1000, units);
}

/** A time of day, with the date unless it is today. */
export function when(time) {
  const date = new Date(time);
  if (Number.isNaN(date.valueOf())) return String(time);
  const clock = date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });
  return date.toDateString() === new Date().toDateString() ? clock : `${date.toLocaleDateString()} ${clock}`;
}

const TONES = {
  ready: "good", running: "busy", starting: "busy", creating: "busy", stopping: "busy", created: "off", suspended: "off", stopped: "off", unreachable: "warn",
  crashed: "bad", failed: "bad", ended: "off", lost: "bad", allowed: "good", denied: "bad",
};

/** The class that colours a state. */
export function tone(state) {
  return Object.hasOwn(TONES, state) ? TONES[state] : "off";
}

/** What may be done to a VM in a state. */
export function actions(vm) {
  const isUp = ["starting", "running", "ready", "unreachable"].includes(vm.state);
  return {
    start: ["created", "suspended", "stopped", "crashed", "failed"].includes(vm.state),
    stop: isUp || vm.state === "suspended",
    restart: ["running", "ready", "unreachable"].includes(vm.state),
    delete: vm.state !== "creating" && !vm.protected,
    isUp,
  };
}
