// Repeats a question while a view is there and somebody can see it.

/** Waits, unless the view goes. */
function pause(ms, signal) {
  return new Promise((resolve) => {
    const done = () => {
      clearTimeout(timer);
      signal.removeEventListener("abort", done);
      resolve();
    };
    const timer = setTimeout(done, ms);
    signal.addEventListener("abort", done);
  });
}

/** Waits until the page is visible, or the view goes. */
function visible(signal) {
  if (!document.hidden) return Promise.resolve();
  return new Promise((resolve) => {
    const look = () => {
      if (document.hidden && !signal.aborted) return;
      document.removeEventListener("visibilitychange", look);
      signal.removeEventListener("abort", look);
      resolve();
    };
    document.addEventListener("visibilitychange", look);
    signal.addEventListener("abort", look);
  });
}

/**
 * Asks again and again until `signal` is aborted: `ask` right away, and then every `ms` milliseconds, later after errors. What fails is
 * given to `failed`, which returns whether to go on.
 */
export async function poll(signal, ms, ask, failed) {
  let failures = 0;
  while (!signal.aborted) {
    await visible(signal);
    if (signal.aborted) return;
    try {
      if (await ask() === false) return;
      failures = 0;
    } catch (error) {
      if (signal.aborted || failed(error) === false) return;
      failures += 1;
    }
    await pause(failures ? Math.min(1000 * 2 ** failures, 15_000) : ms, signal);
  }
}
