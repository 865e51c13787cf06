// Counters and histograms, and the text that Prometheus reads (exposition format 0.0.4). Small on purpose: what we
// count is a dozen series, and a client library would bring its own registry, defaults and runtime assumptions.

export type Labels = Readonly<Record<string, string>>;
export type SeriesType = "counter" | "gauge" | "histogram" | "untyped";

/** Something that can say its samples. */
export interface Series {
  readonly name: string;
  readonly help: string;
  readonly type: SeriesType;
  samples(): Iterable<readonly [suffix: string, labels: Labels, value: number]>;
}

/** One number per set of labels, which only rises. */
export class Counter implements Series {
  readonly type = "counter";
  readonly #values = new Map<string, { labels: Labels; value: number }>();

  constructor(
    readonly name: string,
    readonly help: string,
  ) {}

  add(labels: Labels, value = 1): void {
    const entry = entryOf(this.#values, labels, () => ({ labels, value: 0 }));
    entry.value += value;
  }

  *samples(): Generator<readonly [string, Labels, number]> {
    for (const { labels, value } of this.#values.values()) yield ["", labels, value];
  }
}

/** Where samples fell, per set of labels. */
export class Histogram implements Series {
  readonly type = "histogram";
  readonly #values = new Map<string, { labels: Labels; counts: number[]; sum: number }>();

  /** `bounds`: upper bounds of the buckets, rising; one without a bound follows. */
  constructor(
    readonly name: string,
    readonly help: string,
    readonly bounds: readonly number[],
  ) {}

  observe(labels: Labels, value: number): void {
    const empty = () => ({ labels, counts: Array.from({ length: this.bounds.length + 1 }, () => 0), sum: 0 });
    const entry = entryOf(this.#values, labels, empty);
    const bucket = this.bounds.findIndex((bound) => value <= bound);
    entry.counts[bucket < 0 ? this.bounds.length : bucket]!++;
    entry.sum += value;
  }

  *samples(): Generator<readonly [string, Labels, number]> {
    for (const { labels, counts, sum } of this.#values.values()) {
      let count = 0;
      for (const [i, bound] of [...this.bounds, Infinity].entries()) {
        count += counts[i]!;
        yield ["_bucket", { ...labels, le: bound === Infinity ? "+Inf" : String(bound) }, count];
      }
      yield ["_sum", labels, sum];
      yield ["_count", labels, count];
    }
  }
}

/** A series whose samples were made elsewhere. */
export function fixedSeries(
  type: SeriesType,
  name: string,
  help: string,
  values: readonly (readonly [labels: Labels, value: number])[],
): Series {
  return { name, help, type, samples: () => values.map(([labels, value]) => ["", labels, value] as const) };
}

export const EXPOSITION_TYPE = "text/plain; version=0.0.4; charset=utf-8";

/** Series without samples are left out. */
export function render(series: readonly Series[]): string {
  return series
    .map((each) => {
      const lines = [...each.samples()].map(([suffix, labels, value]) => {
        return `${each.name}${suffix}${renderLabels(labels)} ${value}`;
      });
      const head = [`# HELP ${each.name} ${each.help}`, `# TYPE ${each.name} ${each.type}`];
      return lines.length === 0 ? "" : `${[...head, ...lines].join("\n")}\n`;
    })
    .join("");
}

function renderLabels(labels: Labels): string {
  const pairs = Object.entries(labels).map(([name, value]) => `${name}="${escape(value)}"`);
  return pairs.length === 0 ? "" : `{${pairs.join(",")}}`;
}

function escape(value: string): string {
  return value.replaceAll("\\", String.raw`\\`).replaceAll('"', String.raw`\"`).replaceAll("\n", String.raw`\n`);
}

function entryOf<Entry>(values: Map<string, Entry>, labels: Labels, make: () => Entry): Entry {
  const key = JSON.stringify(Object.values(labels));
  const found = values.get(key);
  if (found !== undefined) return found;
  const made = make();
  values.set(key, made);
  return made;
}
