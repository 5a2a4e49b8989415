{{- define "dtrain.fullname" -}}
{{- if .Values.fullnameOverride }}{{ .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- /* What a pod is selected by. Never changes for a release: selectors are immutable. */}}
{{- define "dtrain.selector" -}}
app.kubernetes.io/name: dtrain
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "dtrain.labels" -}}
{{ include "dtrain.selector" . }}
app.kubernetes.io/part-of: dtrain
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{- define "dtrain.image" -}}
{{- $image := index .root.Values.image .component }}
{{- $name := $image.repository }}
{{- if .root.Values.image.registry }}{{ $name = printf "%s/%s" .root.Values.image.registry $name }}{{ end }}
{{- if $image.digest }}{{ printf "%s@%s" $name $image.digest }}
{{- else }}{{ printf "%s:%s" $name (default .root.Chart.AppVersion $image.tag) }}{{ end }}
{{- end }}

{{- define "dtrain.any" -}}
{{ if .Values.ipv6 }}[::]{{ else }}0.0.0.0{{ end }}
{{- end }}

{{- define "dtrain.settings.common" -}}
DTRAIN_CLUSTER: {{ .Values.cluster | quote }}
DTRAIN_ENDPOINTS_FILE: /etc/dtrain/etcd/endpoints
DTRAIN_TTL: {{ .Values.ttlSeconds | quote }}
DTRAIN_LOG_JSON: "true"
{{- if .Values.etcd.tls.enabled }}
DTRAIN_CACERT: /etc/dtrain/etcd-tls/etcd-ca.crt
DTRAIN_CERT: /etc/dtrain/etcd-tls/etcd.crt
DTRAIN_KEY: /etc/dtrain/etcd-tls/etcd.key
{{- end }}
{{- if .Values.tls.enabled }}
{{- $secrets := eq .Values.tls.source "secrets" }}
DTRAIN_TLS_CERT: /etc/dtrain/tls/{{ ternary "grpc" "tls" $secrets }}.crt
DTRAIN_TLS_KEY: /etc/dtrain/tls/{{ ternary "grpc" "tls" $secrets }}.key
DTRAIN_TLS_CACERT: {{ ternary "/etc/dtrain/tls-ca/grpc-ca.crt" "/etc/dtrain/tls/ca.crt" $secrets }}
{{- end }}
{{- range $name, $value := .Values.settings }}
{{ $name }}: {{ $value | toString | quote }}
{{- end }}
{{- end }}

{{- define "dtrain.settings.coordinator" -}}
DTRAIN_LISTEN: {{ printf "%s:7070" (include "dtrain.any" .) | quote }}
DTRAIN_HEALTH_LISTEN: {{ printf "%s:7080" (include "dtrain.any" .) | quote }}
{{- if .Values.store.default }}
DTRAIN_DEFAULT_STORE: {{ .Values.store.default | quote }}
{{- end }}
{{- range $name, $value := .Values.coordinator.settings }}
{{ $name }}: {{ $value | toString | quote }}
{{- end }}
{{- end }}

{{- define "dtrain.settings.agent" -}}
DTRAIN_LISTEN: {{ printf "%s:7071" (include "dtrain.any" .) | quote }}
DTRAIN_HEALTH_LISTEN: {{ printf "%s:7081" (include "dtrain.any" .) | quote }}
DTRAIN_DATA_DIR: /var/lib/dtrain
DTRAIN_DRAIN_GRACE: {{ .Values.agent.drainGraceSeconds | quote }}
DTRAIN_STOP_GRACE: {{ .Values.agent.stopGraceSeconds | quote }}
{{- if .Values.agent.slots }}
DTRAIN_SLOTS: {{ .Values.agent.slots | quote }}
{{- end }}
{{- range $name, $value := .Values.agent.settings }}
{{ $name }}: {{ $value | toString | quote }}
{{- end }}
{{- end }}

{{- /* Settings are read at the start of a process: another content is another pod. */}}
{{- define "dtrain.checksum" -}}
{{ printf "%s\n%s" (include "dtrain.settings.common" .root) (include (printf "dtrain.settings.%s" .component) .root) | sha256sum }}
{{- end }}

{{- define "dtrain.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "dtrain.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "dtrain.envFrom" -}}
- configMapRef:
    name: {{ include "dtrain.fullname" .root }}-settings
- configMapRef:
    name: {{ include "dtrain.fullname" .root }}-{{ .component }}-settings
{{- with .root.Values.store.secret }}
- secretRef:
    name: {{ . }}
    optional: true
{{- end }}
{{- end }}

{{- /* etcd's user and the variables that name it, after the one that says the agent's name. */}}
{{- define "dtrain.env.user" -}}
{{- if .root.Values.etcd.auth.enabled }}
- name: DTRAIN_USER
  value: {{ ternary "coordinator" "agent-$(DTRAIN_NAME)" (eq .component "coordinator") }}
- name: DTRAIN_PASSWORD_FILE
  value: /etc/dtrain/etcd-user/{{ ternary "coordinator" "password" (eq .component "coordinator") }}
{{- end }}
{{- end }}

{{- /* Folders are mounted whole, so that the daemons see a change; single files where a pod may see no other. */}}
{{- define "dtrain.mounts" -}}
{{- $variable := ternary "$(DTRAIN_ID)" "$(DTRAIN_NAME)" (eq .component "coordinator") }}
- name: etcd
  mountPath: /etc/dtrain/etcd
  readOnly: true
{{- if .root.Values.etcd.tls.enabled }}
- name: etcd-tls
  mountPath: /etc/dtrain/etcd-tls
  readOnly: true
{{- end }}
{{- if .root.Values.etcd.auth.enabled }}
{{- if eq .component "coordinator" }}
- name: etcd-user
  mountPath: /etc/dtrain/etcd-user
  readOnly: true
{{- else }}
- name: etcd-user
  mountPath: /etc/dtrain/etcd-user/password
  subPathExpr: agent-{{ $variable }}
  readOnly: true
{{- end }}
{{- end }}
{{- if .root.Values.tls.enabled }}
{{- if eq .root.Values.tls.source "csi" }}
- name: tls
  mountPath: /etc/dtrain/tls
  readOnly: true
{{- else }}
- name: tls
  mountPath: /etc/dtrain/tls/grpc.crt
  subPathExpr: {{ $variable }}.crt
  readOnly: true
- name: tls
  mountPath: /etc/dtrain/tls/grpc.key
  subPathExpr: {{ $variable }}.key
  readOnly: true
- name: tls-ca
  mountPath: /etc/dtrain/tls-ca
  readOnly: true
{{- end }}
{{- end }}
{{- end }}

{{- define "dtrain.volumes" -}}
{{- $coordinator := eq .component "coordinator" }}
- name: etcd
  configMap:
    name: {{ include "dtrain.fullname" .root }}-etcd
{{- if .root.Values.etcd.tls.enabled }}
- name: etcd-tls
  secret:
    secretName: {{ .root.Values.etcd.tls.secret }}
    defaultMode: 0440
{{- end }}
{{- with .root.Values.etcd.auth }}
{{- if .enabled }}
- name: etcd-user
  secret:
    secretName: {{ ternary .coordinatorSecret .agentsSecret $coordinator }}
    defaultMode: 0440
{{- end }}
{{- end }}
{{- if .root.Values.tls.enabled }}
{{- if eq .root.Values.tls.source "csi" }}
{{- $cluster := .root.Values.cluster }}
- name: tls
  csi:
    driver: csi.cert-manager.io
    readOnly: true
    volumeAttributes:
      csi.cert-manager.io/issuer-name: {{ .root.Values.tls.csi.issuerName }}
      csi.cert-manager.io/issuer-kind: {{ .root.Values.tls.csi.issuerKind }}
      csi.cert-manager.io/uri-sans: dtrain://{{ $cluster }}/{{ .component }}/${POD_NAME}
      csi.cert-manager.io/dns-names: {{ ternary (printf "coordinator.%s.dtrain" $cluster) (printf "${POD_NAME}.agent.%s.dtrain" $cluster) $coordinator }}
      csi.cert-manager.io/key-usages: digital signature,key encipherment,server auth,client auth
      csi.cert-manager.io/duration: {{ .root.Values.tls.csi.duration }}
      csi.cert-manager.io/renew-before: {{ .root.Values.tls.csi.renewBefore }}
      csi.cert-manager.io/fs-group: "10001"
{{- else }}
- name: tls
  secret:
    secretName: {{ ternary .root.Values.tls.secrets.coordinators .root.Values.tls.secrets.agents $coordinator }}
    defaultMode: 0440
- name: tls-ca
  secret:
    secretName: {{ .root.Values.tls.secrets.authorities }}
    defaultMode: 0444
{{- end }}
{{- end }}
{{- end }}

{{- define "dtrain.scheduling" -}}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* What a schema cannot say about values that exclude each other. */}}
{{- define "dtrain.check" -}}
{{- if and .Values.agent.workspace.configMap .Values.agent.workspace.claim }}
{{- fail "agent.workspace: give configMap or claim, not both" }}
{{- end }}
{{- if and (eq .Values.agent.kind "DaemonSet") .Values.agent.data.persistent }}
{{- fail "agent.data.persistent needs agent.kind StatefulSet: a DaemonSet has no volumes of its own" }}
{{- end }}
{{- if and (eq .Values.agent.kind "DaemonSet") .Values.etcd.auth.enabled .Values.tls.enabled (eq .Values.tls.source "csi") }}
{{- fail "etcd.auth needs agents whose names are known: with agent.kind DaemonSet use tls.source secrets, or a StatefulSet" }}
{{- end }}
{{- if and (eq .Values.agent.kind "DaemonSet") .Values.etcd.auth.enabled (eq .Values.agent.nameFrom "pod") }}
{{- fail "etcd.auth needs agents whose names are known: agent.nameFrom must be node" }}
{{- end }}
{{- $grace := add .Values.agent.drainGraceSeconds .Values.agent.stopGraceSeconds }}
{{- if le (int .Values.agent.terminationGracePeriodSeconds) (int $grace) }}
{{- fail (printf "agent.terminationGracePeriodSeconds must be above drainGraceSeconds + stopGraceSeconds (%d), or a drain is cut short" (int $grace)) }}
{{- end }}
{{- end }}
