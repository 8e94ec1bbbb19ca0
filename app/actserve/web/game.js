// One game: its WebSocket, the messages from the service and the commands to it. Skips frames that it cannot draw in time.

import * as token from "./token.js";

export class Game {
  // `on`: the callbacks hello(hello), picture(head, bitmap, png) and end(game). None is called after `stop`.
  constructor(choice, command, on) {
    const query = new URLSearchParams(Object.entries(choice).filter(([, value]) => value));
    const url = new URL(`games?${query}`, location.href);
    url.protocol = url.protocol.replace("http", "ws");
    this.on = on;
    this.command = command;
    this.over = false;
    this.error = null;
    this.next = null; // the frame to draw next, {head, png}
    this.drawing = null; // the promise of `draw` while it runs
    this.socket = new WebSocket(url, token.protocols());
    this.socket.binaryType = "arraybuffer";
    this.socket.onmessage = ({ data }) => (typeof data === "string" ? this.text(JSON.parse(data)) : this.binary(data));
    this.socket.onclose = async () => {
      await this.drawing;
      this.on?.end(this);
    };
  }

  stop() {
    this.on = null;
    this.socket.close();
  }

  send(change) {
    Object.assign(this.command, change);
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(this.command));
  }

  text(message) {
    if (message.error) this.error = message.error.message;
    else {
      this.on?.hello(message);
      this.send({});
    }
  }

  binary(data) {
    const length = new DataView(data).getUint32(0, true);
    const head = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
    const png = new Blob([new Uint8Array(data, 4 + length)], { type: "image/png" });
    this.over = head.over;
    for (const name of ["rewards", "queue_us", "run_us"]) head[name].unshift(...(this.next?.head[name] ?? []));
    this.next = { head, png };
    this.drawing ??= this.draw();
  }

  async draw() {
    while (this.next) {
      const { head, png } = this.next;
      this.next = null;
      const bitmap = await createImageBitmap(png);
      this.on?.picture(head, bitmap, png);
      bitmap.close();
    }
    this.drawing = null;
  }
}
