// What the edge counts and shows to Prometheus, and what it keeps of its sidecars' statistics.

import { afterAll, beforeAll, describe, expect, setDefaultTimeout, test } from "bun:test";
import { sql } from "drizzle-orm";
import { Counter, fixedSeries, Histogram, render } from "../../edge/prometheus.ts";
import { StatsSampler } from "../../edge/stats-sampler.ts";
import { startEdge, type TestEdge, user } from "../support/edge.ts";
import { FakeSidecar } from "../support/fake-sidecar.ts";
import { startPostgres, type TestPostgres } from "../support/postgres.ts";

setDefaultTimeout(60_000);

let pg: TestPostgres;
let sidecar: FakeSidecar;
let edge: TestEdge;

beforeAll(async () => {
  pg = await startPostgres();
  sidecar = new FakeSidecar();
  edge = await startEdge(pg.url, [sidecar]);
});

afterAll(async () => {
  await edge?.close();
  await sidecar?.stop();
  await pg?.remove();
});

/** Samples by name with labels, as Prometheus would read them. */
async function scrape(on: TestEdge, init?: RequestInit): Promise<Map<string, number>> {
  const response = await on.request("/metrics", init);
  expect(response.headers.get("content-type")).toStartWith("text/plain; version=0.0.4");
  const lines = (await response.text()).split("\n").filter((line) => line !== "" && !line.startsWith("#"));
  return new Map(
    lines.map((line) => {
      const match = /^([a-z0-9_]+(?:\{.*\})?) (\S+)$/.exec(line);
      if (match === null) throw new Error(`no sample: ${line}`);
      return [match[1]!, Number(match[2])];
    }),
  );
}

describe("the exposition format", () => {
  test("has help, type, escaped labels, and cumulative buckets", () => {
    const counter = new Counter("c_total", "Things.");
    counter.add({ name: 'a"b\\c\nd' }, 2);
    counter.add({ name: 'a"b\\c\nd' });
    const histogram = new Histogram("h_seconds", "Times.", [0.1, 1]);
    for (const value of [0.05, 0.1, 0.5, 7]) histogram.observe({}, value);
    const empty = fixedSeries("gauge", "g", "Nothing yet.", []);
    expect(render([counter, histogram, empty])).toBe(
      [
        "# HELP c_total Things.",
        "# TYPE c_total counter",
        String.raw`c_total{name="a\"b\\c\nd"} 3`,
        "# HELP h_seconds Times.",
        "# TYPE h_seconds histogram",
        'h_seconds_bucket{le="0.1"} 2',
        'h_seconds_bucket{le="1"} 3',
        'h_seconds_bucket{le="+Inf"} 4',
        "h_seconds_sum 7.65",
        "h_seconds_count 4",
        "",
      ].join("\n"),
    );
  });
});

describe("GET /metrics", () => {
  test("counts answers, tokens by tier, misses, times and failures", async () => {
    await edge.chat({});
    await (await edge.chat({ stream: true })).text();
    sidecar.script = (stream) => stream.error("queue_full", "full");
    await edge.chat({});
    await edge.request("/v1/conversations/nope");
    await edge.request("/healthz");
    await edge.request("/healthz", { headers: { host: "elsewhere" } });
    const metrics = await scrape(edge);
    const expected = {
      'kvasir_request_success_total{model="tiny",finished_reason="stop"}': 2,
      'kvasir_request_failure_total{model="tiny",code="queue_full"}': 1,
      'kvasir_prompt_tokens_total{model="tiny"}': 20,
      'kvasir_generation_tokens_total{model="tiny"}': 6,
      'kvasir_prefix_cache_hits_total{model="tiny",tier="gpu"}': 10,
      'kvasir_prefix_cache_hits_total{model="tiny",tier="disk"}': 2,
      'kvasir_prefix_cache_misses_total{model="tiny",reason="absent"}': 4,
      'kvasir_cache_choices_total{model="tiny",choice="none"}': 2,
      'kvasir_time_to_first_token_seconds_count{model="tiny"}': 2,
      'kvasir_e2e_request_latency_seconds_bucket{model="tiny",le="+Inf"}': 2,
      'kvasir_request_queue_time_seconds_sum{model="tiny"}': 0.001,
      'kvasir_time_per_output_token_seconds_sum{model="tiny"}': 0.006,
      'kvasir_http_requests_total{method="POST",route="/v1/chat/completions",status="200"}': 2,
      'kvasir_http_requests_total{method="POST",route="/v1/chat/completions",status="429"}': 1,
      'kvasir_http_requests_total{method="GET",route="/v1/conversations/:id",status="404"}': 1,
      'kvasir_http_requests_total{method="GET",route="/healthz",status="200"}': 2,
      kvasir_edge_answers: 0,
      kvasir_database_up: 1,
    };
    for (const [name, value] of Object.entries(expected)) expect([name, metrics.get(name)]).toEqual([name, value]);
  });

  test("counts a client that leaves as no fault of the server", async () => {
    const running = Promise.withResolvers<void>();
    const silent = new FakeSidecar({ script: () => running.resolve() });
    const own = await startEdge(pg.url, [silent]);
    const leave = new AbortController();
    const answer = own.chat({}, { signal: leave.signal });
    await running.promise;
    leave.abort();
    await answer;
    const statuses = [...(await scrape(own))].filter(([name]) => name.startsWith("kvasir_http_requests_total"));
    expect(statuses).toEqual([
      ['kvasir_http_requests_total{method="POST",route="/v1/chat/completions",status="499"}', 1],
    ]);
    await own.close();
    await silent.stop();
  });

  test("shows the sidecars' statistics, nested ones too, and does not wait for one that is away", async () => {
    const gone = new FakeSidecar({ name: "gone" });
    const own = await startEdge(pg.url, [sidecar, gone]);
    await own.chat({ ...user("hi") }); // by now both have said hello
    const tiers = { gpuBlocks: 8, gpuBlocksAvailable: 6, hostBlocks: 10, hostBlocksUsed: 1, diskBlocks: 0 };
    const nested = { disk: { blocksUsed: 5, name: "x" }, list: [1] };
    sidecar.stats = { runningSequences: 3, tokensGenerated: 7, ...tiers, ...nested };
    await gone.stop();
    const metrics = await scrape(own);
    expect(metrics.get('kvasir_num_requests_running{sidecar="fake"}')).toBe(3);
    expect(metrics.get('kvasir_sidecar_tokens_generated{sidecar="fake"}')).toBe(7);
    expect(metrics.get('kvasir_sidecar_disk_blocks_used{sidecar="fake"}')).toBe(5);
    const usage = [...metrics].filter(([name]) => name.startsWith("kvasir_kv_cache_usage_perc"));
    expect(usage).toEqual([
      ['kvasir_kv_cache_usage_perc{sidecar="fake",tier="gpu"}', 0.25],
      ['kvasir_kv_cache_usage_perc{sidecar="fake",tier="host"}', 0.1],
    ]);
    const up = [...metrics].filter(([name]) => name.startsWith("kvasir_sidecar_up"));
    expect(up.map(([, value]) => value).toSorted()).toEqual([0, 1]);
    await own.close();
  });

  test("wants the API key where there is one", async () => {
    const own = await startEdge(pg.url, [sidecar], [], { KVASIR_API_KEY: "key" });
    expect((await own.request("/metrics")).status).toBe(401);
    expect((await scrape(own, { headers: { authorization: "Bearer key" } })).size).toBeGreaterThan(0);
    await own.close();
  });
});

describe("the sampler", () => {
  test("keeps what each sidecar says about itself", async () => {
    const { database, log, sidecars } = edge.services;
    const sampler = new StatsSampler(database, log, () => sidecars.clients);
    sidecar.stats = { steps: 42 };
    await sampler.sample();
    sampler.close();
    const rows = await database.run((orm) => orm.execute(sql`select sidecar, stats from sidecar_stats_latest`));
    expect([...rows]).toEqual([{ sidecar: "fake", stats: { steps: 42 } }]);
  });
});
