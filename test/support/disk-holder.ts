// A process that opens a disk file and holds it until it is killed. Arguments: library, file, bytes.

import { Disk } from "../../sidecar/native-disk.ts";
import { NativeLibrary } from "../../sidecar/native.ts";

const [libraryPath, path, bytes] = process.argv.slice(2);
const disk = new Disk(new NativeLibrary(libraryPath!), path!, Number(bytes), 1);
console.log("open");
setInterval(() => disk.reap(), 1000);
