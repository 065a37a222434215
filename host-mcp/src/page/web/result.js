// Results and errors of tools, the same over HTTP and through a host app.

/** A call that failed: `code`, a message, what to do next, and the plan to confirm, if that is needed. */
export class Failure extends Error {
  constructor({ code, message, hint, confirm }) {
    super(message);
    Object.assign(this, { code, hint, confirm });
  }
}

/** The token or the connection does not work any more. */
export class Refused extends Failure {}

/** The facts and the texts of a result; throws a `Failure` for a result that says it is an error. */
export function read(result) {
  const meta = result?._meta ?? {};
  const blocks = (result?.content ?? []).filter((block) => block.type === "text");
  if (result?.isError) {
    const text = blocks.map((block) => block.text).join("\n");
    const said = meta["dev.nexus/error"] ?? {};
    throw new Failure({ code: said.code ?? "failed", message: said.message ?? text, hint: said.hint, confirm: said.confirm });
  }
  const streams = {};
  for (const block of blocks) {
    const name = block._meta?.["dev.nexus/stream"];
    if (name) streams[name] = (streams[name] ?? "") + block.text;
  }
  return { facts: result?.structuredContent ?? meta["dev.nexus/result"] ?? {}, streams };
}
