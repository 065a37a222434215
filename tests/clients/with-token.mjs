// A proxy on loopback that adds a token to each request, for clients that cannot send one: with-token.mjs PORT TOKEN. Prints its own port.
import http from "node:http";

const [port, token] = process.argv.slice(2);
const proxy = http.createServer((request, response) => {
  const headers = { ...request.headers, authorization: `Bearer ${token}` };
  const to = { host: "127.0.0.1", port, path: request.url, method: request.method, headers };
  const forwarded = http.request(to, (answer) => {
    response.writeHead(answer.statusCode, answer.headers);
    answer.pipe(response);
  });
  forwarded.on("error", () => response.destroy());
  response.on("close", () => forwarded.destroy());
  request.pipe(forwarded);
});
proxy.listen(0, "127.0.0.1", () => console.log(proxy.address().port));
