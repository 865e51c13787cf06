// A line plot as an SVG document: no dependencies, readable on light and dark backgrounds.

export interface Line {
  readonly name: string;
  readonly color: string;
  readonly isDashed?: boolean;
  readonly points: readonly (readonly [x: number, y: number])[];
}

export interface PlotLabels {
  readonly title: string;
  readonly x: string;
  readonly y: string;
}

const WIDTH = 640;
const HEIGHT = 400;
const MARGIN = { left: 60, right: 20, top: 40, bottom: 75 };

/** y runs from 0 to 1 and is shown in percent; x from the smallest to the largest. */
export function linePlot({ title, x, y }: PlotLabels, lines: readonly Line[]): string {
  const xs = [...new Set(lines.flatMap((line) => line.points.map(([value]) => value)))].sort((a, b) => a - b);
  const [first, last] = [xs[0]!, xs.at(-1)!];
  const innerWidth = WIDTH - MARGIN.left - MARGIN.right;
  const innerHeight = HEIGHT - MARGIN.top - MARGIN.bottom;
  const toX = (value: number) => MARGIN.left + ((value - first) / (last - first || 1)) * innerWidth;
  const toY = (value: number) => MARGIN.top + (1 - value) * innerHeight;
  const bottom = HEIGHT - MARGIN.bottom;
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${HEIGHT}"`,
    ` font-family="sans-serif" font-size="12">`,
    `<rect width="${WIDTH}" height="${HEIGHT}" fill="#fff"/>`,
    text(WIDTH / 2, 22, title, 'text-anchor="middle" font-size="14"'),
    ...[0, 0.2, 0.4, 0.6, 0.8, 1].flatMap((value) => [
      `<path d="M${MARGIN.left} ${round(toY(value))}H${WIDTH - MARGIN.right}" stroke="#ddd"/>`,
      text(MARGIN.left - 6, toY(value) + 4, `${Math.round(value * 100)}%`, 'text-anchor="end"'),
    ]),
    ...withoutCrowding(xs, toX).map((value) =>
      text(toX(value), bottom + 16, String(Number(value.toPrecision(3))), 'text-anchor="middle"'),
    ),
    text(MARGIN.left + innerWidth / 2, bottom + 34, x, 'text-anchor="middle"'),
    text(14, MARGIN.top - 12, y, ""),
    ...lines.map((line) => polyline(line, toX, toY)),
    ...lines.flatMap((line, i) => legend(line, MARGIN.left + (i * innerWidth) / lines.length, bottom + 58)),
    "</svg>",
    "",
  ].join("\n");
}

function polyline(line: Line, toX: (x: number) => number, toY: (y: number) => number): string {
  const places = line.points.map(([x, y]) => `${round(toX(x))},${round(toY(y))}`).join(" ");
  return `<polyline points="${places}" fill="none" ${stroke(line)}/>`;
}

function legend(line: Line, x: number, y: number): string[] {
  return [`<path d="M${round(x)} ${y - 4}h24" ${stroke(line)}/>`, text(x + 30, y, line.name, "")];
}

function stroke({ color, isDashed }: Line): string {
  return `stroke="${color}" stroke-width="2"${isDashed ? ' stroke-dasharray="5 4"' : ""}`;
}

/** Labels at least 32 units apart. */
function withoutCrowding(values: readonly number[], toX: (x: number) => number): number[] {
  const shown: number[] = [];
  for (const value of values) {
    if (shown.length === 0 || toX(value) - toX(shown.at(-1)!) >= 32) shown.push(value);
  }
  return shown;
}

function text(x: number, y: number, content: string, attributes: string): string {
  const escaped = content.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
  return `<text x="${round(x)}" y="${round(y)}" fill="#222" ${attributes}>${escaped}</text>`;
}

function round(value: number): number {
  return Math.round(value * 10) / 10;
}
