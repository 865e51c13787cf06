// A process that opens a disk file and holds it until it is killed. Arguments: library, file, bytes.

import { NativeLibrary } from "../../sidecar/native.ts";

const [libraryPath, path, bytes] = process.argv.slice(2);
const disk = new NativeLibrary(libraryPath!).openDisk(path!, Number(bytes), 1);
console.log("open");
setInterval(() => disk.reap(), 1000);
