// Drains waiting jobs with graphile-worker, in a folder of its own: `URL ITEMS CONCURRENCY default|tuned`. Prints JSON.
//
// In no order: its queue names, which would keep one, are not meant for thousands of threads. "tuned" is what its
// documentation recommends for throughput: a local queue of 500 jobs, completions in batches.
import { readFileSync } from "node:fs";
import { Logger, makeWorkerUtils, run } from "graphile-worker";

const [url, items, concurrency, mode] = [process.argv[2], Number(process.argv[3]), Number(process.argv[4]), process.argv[5]];
const { version } = JSON.parse(readFileSync(new URL("node_modules/graphile-worker/package.json", import.meta.url)));
const logger = new Logger(() => () => {});

const utils = await makeWorkerUtils({ connectionString: url, logger });
await utils.migrate();
for (let n = 0; n < items; n += 1000) {
  const jobs = Array.from({ length: Math.min(1000, items - n) }, (_, k) => ({ identifier: "noop", payload: { n: n + k } }));
  await utils.addJobs(jobs);
}

let done = 0;
let finish;
const last = new Promise((resolve) => (finish = resolve));
const began = performance.now();
const runner = await run({
  connectionString: url,
  logger,
  concurrency,
  maxPoolSize: concurrency + 4,
  noHandleSignals: true,
  preset: mode === "tuned" ? { worker: { localQueue: { size: 500 }, completeJobBatchDelay: 0, failJobBatchDelay: 0 } } : {},
  taskList: {
    noop: async () => {
      done += 1;
      if (done === items) finish(performance.now());
    },
  },
});
const ended = await last;
await runner.stop();
await utils.release();
console.log(JSON.stringify({ version, items: done, seconds: (ended - began) / 1000 }));
