// File systems that refuse things, for tests of what happens then: mounting needs root, so a test asks first.

import { mkdtempSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

/**
 * tmpfs: has a size. ramfs: no O_DIRECT, no fallocate, no size. ext2: no fallocate, sparse files, has a size.
 */
export type FileSystem = "tmpfs" | "ramfs" | "ext2";

export class MountedFileSystem {
  private constructor(
    readonly root: string,
    readonly path: string,
  ) {}

  /** Null where it cannot be mounted: no root, or a sandbox. */
  static mount(type: FileSystem, bytes: number): MountedFileSystem | null {
    const root = mkdtempSync(join(tmpdir(), "kvasir-mount-"));
    const path = join(root, "mounted");
    if (run(["mkdir", path]) && mountAt(type, bytes, root, path)) return new MountedFileSystem(root, path);
    rmSync(root, { recursive: true });
    return null;
  }

  [Symbol.dispose](): void {
    run(["umount", "-l", this.path]);
    rmSync(this.root, { recursive: true });
  }
}

function mountAt(type: FileSystem, bytes: number, root: string, path: string): boolean {
  if (type !== "ext2") return run(["mount", "-t", type, "-o", `size=${bytes}`, type, path]);
  const image = join(root, "image");
  writeFileSync(image, "");
  truncateSync(image, bytes);
  return run(["mkfs.ext2", "-q", "-m", "0", image]) && run(["mount", "-t", "ext2", "-o", "loop", image, path]);
}

function run(command: string[]): boolean {
  if (Bun.which(command[0]!) === null) return false;
  return Bun.spawnSync(command, { stdout: "ignore", stderr: "ignore" }).exitCode === 0;
}
